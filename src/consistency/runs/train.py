"""`consistency-train`: configuration in, run directory out."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from consistency.callbacks.averaging import WeightEMA
from consistency.callbacks.checkpointing import RunCheckpoint
from consistency.callbacks.ending import EndOfRun
from consistency.callbacks.pruning import PruneTrial
from consistency.callbacks.quality import QualityCallback
from consistency.callbacks.randomness import StepSeeds
from consistency.callbacks.wandb_logger import WandbLogger
from consistency.checkpoints.io import load_denoiser, read_checkpoint, save_denoiser
from consistency.data.module import ImageDataModule, warn_about_sigma_data
from consistency.files import CHECKPOINT, MODEL_FOLDER
from consistency.methods.distillation import ConsistencyDistillation
from consistency.models.denoiser import Denoiser
from consistency.runs.folder import RefusedError, say_where, status_of, write_status
from consistency.runs.objective import check_objective, results
from consistency.runs.tracking import describe_wandb_run, finish_wandb

log = logging.getLogger(__name__)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its tips and device lists
_EXPECTED_WARNINGS = (
    ".*does not have many workers.*",
    ".*`tensorboardX`.*",
    ".*LeafSpec.*",
    ".*in eval mode at the start of training.*",  # the teacher, on purpose
)


def train(cfg: DictConfig) -> float | None:
    """Train a model into its run directory, from its checkpoint where there is one; called by `runs.start`.

    Returns:
        The objective, for sweeps: a score of `callbacks=quality`, or the last logged loss.
    """
    run_dir = Path(cfg.paths.output_dir)
    is_first_rank = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    checkpoint = run_dir / CHECKPOINT if (run_dir / CHECKPOINT).exists() else None
    # A damaged file is an error before anything is built.
    before = read_checkpoint(checkpoint).get("consistency", {}) if checkpoint is not None else {}

    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data = instantiate(cfg.data, _convert_="object")
    data.setup("fit")
    _check_same_data(before.get("data"), data, run_dir)
    method = instantiate(cfg.method, _convert_="object")
    if cfg.init_from and checkpoint is None:
        _start_from(method, cfg.init_from)
    if isinstance(method, ConsistencyDistillation):
        log.info("the network is that of teacher=%s; network= is not used", cfg.teacher)
    _check_fits(method.denoiser, data, sigma_data=cfg.noise.sigma_data, noise_scale=cfg.noise.noise_scale)
    warn_about_sigma_data(data.sigma_data(), method.denoiser.sigma_data)
    callbacks = [StepSeeds(cfg.seed), EndOfRun(cfg.trainer.max_steps), *_parts(cfg.callbacks)]
    for callback in callbacks:
        if isinstance(callback, QualityCallback):
            callback.prepare(data)  # what is missing is said before training starts
    check_objective(cfg.objective, callbacks)
    trainer = _trainer(cfg, callbacks, _loggers(cfg, run_dir), run_dir)

    if is_first_rank:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
        write_status(run_dir, **{**status_of(run_dir), "state": "running", "error": None, "traceback": None})
        count = sum(p.numel() for p in method.denoiser.parameters())
        what = f"{type(method).__name__}, {count:,} parameters, {cfg.trainer.max_steps} steps of {data.batch_size}"
        log.info("%s: %s%s", run_dir, what, f"; continuing from {checkpoint}" if checkpoint else "")
    saver = next((callback for callback in callbacks if isinstance(callback, RunCheckpoint)), None)
    if saver is not None:
        saver.metadata = {
            "config": OmegaConf.to_yaml(cfg, resolve=True),
            "method": type(method).__name__,
            "data": data.identity(),
        }

    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            for expected in _EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message=expected)
            trainer.fit(method, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    finally:
        finish_wandb(trainer)

    seconds = saver.seconds if saver else time.perf_counter() - started
    return _end(cfg, method, callbacks, run_dir, seconds)


def _end(cfg: DictConfig, method: Any, callbacks: list[Any], run_dir: Path, seconds: float) -> float | None:
    """Write down how far the run came, and export the model of one that is finished.

    Raises:
        SystemExit: if it was stopped before its end.
    """
    is_first_rank = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    facts = {
        "step": method.progress.step,
        "images_seen": method.progress.images_seen,
        "seconds": round(seconds, 1),
        **results(cfg.objective, callbacks),
    }
    of_search = next((callback for callback in callbacks if isinstance(callback, PruneTrial)), None)
    if of_search is not None and of_search.pruned:
        if is_first_rank:
            write_status(run_dir, state="pruned", **facts)
            log.info("pruned after %s images: other trials of the search are better", f"{facts['images_seen']:,}")
            of_search.tell(None)
        return facts["objective"]
    if not method.progress.is_over:
        if is_first_rank:
            write_status(run_dir, state="interrupted", **facts)
            log.info("stopped at step %d; the same command continues from the last checkpoint.", facts["step"])
        # What stopped it was a signal, or a limit of the trainer such as max_time.
        number = next((callback.interrupted_by for callback in callbacks if isinstance(callback, RunCheckpoint)), None)
        raise SystemExit(128 + number if number else 1)
    if is_first_rank:
        _export(method, callbacks, run_dir, cfg)
        write_status(run_dir, state="finished", **facts)
        if of_search is not None:
            of_search.tell(facts["objective"])
        log.info("trained %s images in %.0f s", f"{facts['images_seen']:,}", facts["seconds"])
        say_where(run_dir)
    return facts["objective"]


def _trainer(cfg: DictConfig, callbacks: list[Any], loggers: list[Any], run_dir: Path) -> L.Trainer:
    """Lightning's trainer; it makes no checkpoint or bar of its own where ours is switched off."""
    trainer = instantiate(
        cfg.trainer,
        _convert_="object",
        max_steps=-1,  # EndOfRun stops, by steps that happened
        callbacks=callbacks,
        logger=loggers or False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        default_root_dir=run_dir,
    )
    settings = OmegaConf.to_container(cfg, resolve=True)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.trainer = trainer
        logger.log_hyperparams(settings)
    return trainer


def _check_same_data(before: dict[str, Any] | None, data: ImageDataModule, run_dir: Path) -> None:
    """Refuse to continue on other images: their order is a function of how many there are."""
    if before is not None and before != data.identity():
        counts = f"{before['images']:,} images then, {data.identity()['images']:,} now"
        raise RefusedError(
            f"{run_dir} was trained on other data ({counts}{', of other content' if before['sha256'] else ''}); bring "
            "them back, or run_name=NAME for another run, or overwrite=true to set it aside and start afresh"
        )


def _check_fits(denoiser: Denoiser, data: ImageDataModule, *, sigma_data: float, noise_scale: float) -> None:
    """Refuse a network (of a teacher, say) that was made for other images: convolutions would run all the same."""
    if denoiser.image_shape != data.image_shape:
        raise ValueError(
            f"the network is for images {list(denoiser.image_shape)}, the data set has {list(data.image_shape)}; "
            "change data.image_size and data.channels, or teacher"
        )
    if denoiser.num_classes not in (0, data.num_classes):
        raise ValueError(
            f"the network has {denoiser.num_classes} classes, the data set {data.num_classes}; "
            "change network.num_classes (0 for unconditional), or teacher"
        )
    for name, setting in (("sigma_data", sigma_data), ("noise_scale", noise_scale)):
        if (of_teacher := getattr(denoiser, name)) != setting:
            raise ValueError(
                f"the teacher was trained with {name} {of_teacher:g}, noise.{name} is {setting:g}; "
                f"set noise.{name}={of_teacher:g}, or change teacher"
            )


def _start_from(method: Any, source: str) -> None:
    """Give the online (and target) network the weights of another model of the same architecture."""
    start = load_denoiser(source)
    # What a model means depends on settings without weights too: noise_scale, sigma_data, skip_scale, ...
    different = method.denoiser.differences(start.config, ignore=("boundary", "dropout", "dropout_max_resolution"))
    if different:
        raise ValueError(f"init_from={source} is another model ({different}); use its settings")
    method.denoiser.network.load_state_dict(start.network.state_dict())
    if method.target is not None:
        method.target.load_state_dict(method.denoiser.state_dict())


def _parts(group: DictConfig) -> list[Any]:
    """Instantiate a dictionary of parts; those set to null are switched off."""
    for name, part in group.items():
        if part is not None and "_target_" not in part:
            options = ", ".join(map(str, part))
            raise ValueError(
                f"callbacks.{name!s} has options ({options}) but is not part of this choice; set it to null, or choose "
                "the group that has it (callbacks=quality, say)"
            )
    return [instantiate(part, _convert_="object") for part in group.values() if part is not None]


def _loggers(cfg: DictConfig, run_dir: Path) -> list[Any]:
    wandb = cfg.logger.get("wandb")
    if wandb is not None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        describe_wandb_run(wandb, cfg, run_dir)
    return _parts(cfg.logger)


def _export(method: Any, callbacks: list[Any], run_dir: Path, cfg: DictConfig) -> None:
    """Write the model folder with the first average (raw weights where there is none)."""
    info = {
        "method": type(method).__name__,
        "weights": "raw",
        "data": cfg.data.dataset._target_,
        "seed": cfg.seed,
        "step": method.progress.step,
        "images_seen": method.progress.images_seen,
    }
    weights = None
    for callback in callbacks:
        if isinstance(callback, WeightEMA):
            info["weights"] = callback.names[0]
            weights = callback.averages[callback.names[0]]
            break
    save_denoiser(method.denoiser, run_dir / MODEL_FOLDER, info, weights)
