"""`consistency-train`: configuration in, run directory out."""

from __future__ import annotations

import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from consistency.callbacks.averaging import WeightEMA
from consistency.callbacks.checkpointing import RunCheckpoint
from consistency.callbacks.randomness import StepSeeds
from consistency.checkpoints.io import CHECKPOINT, MODEL_FOLDER, load_denoiser, read_checkpoint, save_denoiser
from consistency.data.module import warn_about_sigma_data
from consistency.ops import derive_seed
from consistency.runs.folder import check_same_settings, say_where, set_aside, status_of, write_status

log = logging.getLogger(__name__)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its tips and device lists


def train(cfg: DictConfig) -> float | None:
    """Train a model into its run directory; started again, continue or say that it is finished.

    Returns:
        The last mean loss, for sweeps; None when there was nothing left to do.
    """
    run_dir = Path(cfg.paths.output_dir)
    if cfg.overwrite:
        set_aside(run_dir)
    check_same_settings(cfg, run_dir)
    if status_of(run_dir).get("state") == "finished":
        log.info("%s is finished already; overwrite=true trains it again, run_name=NAME trains another.", run_dir)
        say_where(run_dir)
        return None

    checkpoint = run_dir / CHECKPOINT
    resumes = checkpoint.exists()
    if resumes:
        read_checkpoint(checkpoint)  # a damaged file is an error before anything is built

    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data = instantiate(cfg.data, _convert_="object")
    data.setup("fit")
    warn_about_sigma_data(data.sigma_data(), cfg.noise.sigma_data)
    method = instantiate(cfg.method, _convert_="object")
    if cfg.init_from and not resumes:
        _start_from(method, cfg.init_from)

    callbacks = [StepSeeds(cfg.seed), *_parts(cfg.callbacks)]
    for callback in callbacks:
        if isinstance(callback, RunCheckpoint):
            callback.metadata = {"config": OmegaConf.to_yaml(cfg, resolve=True), "method": type(method).__name__}
    trainer = instantiate(cfg.trainer, _convert_="object", callbacks=callbacks, logger=_loggers(cfg, run_dir) or False)
    if trainer.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
        earlier_seconds = status_of(run_dir).get("seconds", 0.0) if resumes else 0.0
        write_status(run_dir, state="running", seconds=earlier_seconds)
        count = sum(p.numel() for p in method.denoiser.parameters())
        log.info("%s: %s, %s parameters, %d steps of %d images", run_dir, type(method).__name__, f"{count:,}",
                 trainer.max_steps, cfg.data.batch_size)  # fmt: skip
        if resumes:
            log.info("continuing from %s", checkpoint)

    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*`tensorboardX`.*")
        trainer.fit(method, datamodule=data, ckpt_path=checkpoint if resumes else None, weights_only=True)
    seconds = time.perf_counter() - started

    interrupted_by = next((c.interrupted_by for c in callbacks if isinstance(c, RunCheckpoint)), None)
    loss = trainer.callback_metrics.get("loss")
    progress = method.progress
    if trainer.is_global_zero:
        facts = {
            "step": progress.step,
            "images_seen": progress.images_seen,
            "seconds": round(earlier_seconds + seconds, 1),
        }
        if interrupted_by is not None:
            write_status(run_dir, state="interrupted", **facts)
            log.info("stopped at step %d and saved; the same command continues from there.", progress.step)
        else:
            _export(method, callbacks, run_dir, cfg)
            write_status(run_dir, state="finished", **facts)
            log.info("trained %s images in %.0f s", f"{progress.images_seen:,}", facts["seconds"])
            say_where(run_dir)
    if interrupted_by is not None:
        raise SystemExit(128 + interrupted_by)
    return None if loss is None else float(loss)


def _start_from(method: Any, source: str) -> None:
    """Give the online (and target) network the weights of another model of the same architecture."""
    start = load_denoiser(source)
    try:
        method.denoiser.network.load_state_dict(start.network.state_dict())
    except RuntimeError as error:
        mine, theirs = method.denoiser.network.config, start.network.config
        different = ", ".join(
            f"network.{k}={theirs[k]}" for k in theirs if theirs[k] != mine.get(k) and "dropout" not in k
        )
        raise ValueError(f"init_from={source} has another network; set {different}") from error
    if method.target is not None:
        method.target.load_state_dict(method.denoiser.state_dict())


def _parts(group: DictConfig) -> list[Any]:
    """Instantiate a dictionary of parts; those set to null are switched off."""
    return [instantiate(part, _convert_="object") for part in group.values() if part is not None]


def _loggers(cfg: DictConfig, run_dir: Path) -> list[Any]:
    wandb = cfg.logger.get("wandb")
    if wandb is not None and wandb.get("id") is None:
        # The id stays with the run: a resumed run continues the same curve.
        file = run_dir / "wandb_id.txt"
        if not file.exists():
            run_dir.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{derive_seed('wandb', time.time_ns(), os.getpid()):016x}"[-8:])
        wandb.id = file.read_text().strip()
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
            info["weights"] = callback.name()
            weights = callback.averages[callback.name()]
            break
    save_denoiser(method.denoiser, run_dir / MODEL_FOLDER, info, weights)
