"""The jobs behind the commands, each readable from top to bottom."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from consistency.callbacks.averaging import WeightEMA
from consistency.callbacks.checkpointing import RunCheckpoint
from consistency.callbacks.randomness import StepSeeds
from consistency.checkpoints.io import CHECKPOINT, MODEL_FOLDER, load_denoiser, load_model, read_checkpoint, save_denoiser
from consistency.data.files import save_grid, save_npz, save_pngs
from consistency.data.module import warn_about_sigma_data
from consistency.ops import derive_seed, randn_of_seeds, to_uint8

log = logging.getLogger(__name__)

# What a run leaves in its directory, beside Hydra's own .hydra/ and log.
_RUN_FILES = ("config.yaml", "status.json", "metrics.csv", "checkpoints", MODEL_FOLDER, "samples", "tensorboard", "wandb")
# Settings that may differ between a run and its continuation.
_FREE_SETTINGS = ("overwrite", "logger", "paths", "run_name", "study_name", "callbacks.progress", "callbacks.log")


def train(cfg: DictConfig) -> float | None:
    """Train a model into its run directory; started again, continue or say that it is finished.

    Returns:
        The last mean loss, for sweeps; None when there was nothing left to do.
    """
    run_dir = Path(cfg.paths.output_dir)
    if cfg.overwrite:
        _set_aside(run_dir)
    _check_same_settings(cfg, run_dir)
    if _status(run_dir).get("state") == "finished":
        log.info("%s is finished already; overwrite=true trains it again, run_name=NAME trains another.", run_dir)
        _say_where(run_dir)
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
        _write_status(run_dir, state="running")
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
        facts = {"step": progress.step, "images_seen": progress.images_seen, "seconds": round(seconds, 1)}
        if interrupted_by is not None:
            _write_status(run_dir, state="interrupted", **facts)
            log.info("stopped at step %d and saved; the same command continues from there.", progress.step)
        else:
            _export(method, callbacks, run_dir, cfg)
            _write_status(run_dir, state="finished", **facts)
            log.info("trained %s images in %.0f s", f"{progress.images_seen:,}", seconds)
            _say_where(run_dir)
    if interrupted_by is not None:
        raise SystemExit(128 + interrupted_by)
    return None if loss is None else float(loss)


def sample(cfg: DictConfig) -> Path:
    """Draw images from a trained model; returns what was written."""
    denoiser, info = load_model(cfg.ckpt, cfg.weights)
    sampler = instantiate(cfg.sampler, _convert_="object")
    is_diffusion = info.get("method") == "EDM"
    if is_diffusion and not hasattr(sampler, "solver"):
        raise ValueError(
            f"{cfg.ckpt} is a diffusion model, which one evaluation cannot sample; use sampler=heun (or euler, dpm2, "
            "ancestral)"
        )
    device = _device(cfg.device)
    denoiser = denoiser.to(device)
    images, labels = sample_images(
        denoiser, sampler, num_samples=cfg.num_samples, seed=cfg.seed, batch_size=cfg.batch_size, labels=cfg.labels
    )
    out = Path(cfg.out)
    if out.suffix == ".png":
        save_grid(images, out)
    elif out.suffix == ".npz":
        save_npz(images, labels, out)
    else:
        save_pngs(images, out)
    log.info("%d images (%s, weights %s, seed %d) -> %s", len(images), info.get("method", "model"), info.get("weights"),
             cfg.seed, out)  # fmt: skip
    return out


def sample_images(
    denoiser: Any, sampler: Any, *, num_samples: int, seed: int, batch_size: int, labels: Any = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(uint8 [N, C, H, W], int64 [N] or None) on the CPU; image i is a function of (seed, i), not of the batch.

    Args:
        denoiser: A model, on its device.
        sampler: A `ConsistencySampler` or `OdeSampler`.
        num_samples: N.
        seed: Of all images.
        batch_size: Images at a time.
        labels: One label for all, a list that is repeated, or None for random labels by seed; conditional models only.
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"num_samples and batch_size must be at least 1, got {num_samples} and {batch_size}")
    all_labels = _labels(labels, num_samples, seed, denoiser.num_classes)
    device = next(denoiser.parameters()).device
    # EDM integrates in float64; MPS has none.
    state = torch.empty(0, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    batches = []
    for indices in torch.arange(num_samples).split(batch_size):
        randn_like = randn_of_seeds([derive_seed(seed, int(i)) for i in indices], denoiser.image_shape)
        batch_labels = None if all_labels is None else all_labels[indices].to(device)
        batches.append(to_uint8(sampler(denoiser, randn_like(state), batch_labels, randn_like)).cpu())
    return torch.cat(batches), all_labels


def _labels(labels: Any, num_samples: int, seed: int, num_classes: int) -> torch.Tensor | None:
    if num_classes == 0:
        if labels is not None:
            raise ValueError(f"labels={labels} was given, but the model is unconditional; leave labels=null")
        return None
    if labels is None:
        picks = [derive_seed(seed, i, 1) % num_classes for i in range(num_samples)]
    else:
        given = [labels] if isinstance(labels, int) else list(labels)
        if not given or not all(isinstance(label, int) and 0 <= label < num_classes for label in given):
            raise ValueError(f"labels must be integers in [0, {num_classes - 1}], got {labels}")
        picks = [given[i % len(given)] for i in range(num_samples)]
    return torch.tensor(picks)


def _start_from(method: Any, source: str) -> None:
    """Give the online (and target) network the weights of another model of the same architecture."""
    start = load_denoiser(source)
    try:
        method.denoiser.network.load_state_dict(start.network.state_dict())
    except RuntimeError as error:
        mine, theirs = method.denoiser.network.config, start.network.config
        different = ", ".join(f"network.{k}={theirs[k]}" for k in theirs if theirs[k] != mine.get(k) and "dropout" not in k)
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
            file.write_text(f"{derive_seed(time.time_ns(), os.getpid()):016x}"[-8:])
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


def _say_where(run_dir: Path) -> None:
    grids = sorted((run_dir / "samples").glob("*.png"))
    log.info("run directory   %s", run_dir)
    for name in dict.fromkeys(grid.name.rsplit("_", 1)[0] for grid in grids):
        log.info("sample grid     %s", max(grid for grid in grids if grid.name.startswith(f"{name}_")))
    log.info("exported model  %s", run_dir / MODEL_FOLDER)
    is_diffusion = any(grid.name.startswith("heun") for grid in grids)
    sampler = " sampler=heun" if is_diffusion else ""
    log.info("sample from it  consistency-sample ckpt=%s num_samples=100 seed=0%s out=samples.png", run_dir, sampler)


def _status(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "status.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _write_status(run_dir: Path, **status: Any) -> None:
    partial = run_dir / "status.json.partial"
    partial.write_text(json.dumps(status, indent=2) + "\n")
    os.replace(partial, run_dir / "status.json")


def _set_aside(run_dir: Path) -> None:
    """Move the files of an earlier run into previous/1, 2, ...: nothing of the user's is deleted."""
    files = [run_dir / name for name in _RUN_FILES if (run_dir / name).exists()]
    if not files:
        return
    numbers = [int(folder.name) for folder in (run_dir / "previous").glob("*") if folder.name.isdigit()]
    aside = run_dir / "previous" / str(max(numbers, default=0) + 1)
    aside.mkdir(parents=True)
    for file in files:
        file.rename(aside / file.name)
    log.info("set the earlier run aside: %s", aside)


def _check_same_settings(cfg: DictConfig, run_dir: Path) -> None:
    """Refuse to continue a run under settings that would change it."""
    file = run_dir / "config.yaml"
    if not file.exists():
        return
    old = _flat(OmegaConf.to_container(OmegaConf.load(file), resolve=True))
    new = _flat(OmegaConf.to_container(cfg, resolve=True))
    changed = sorted(
        key
        for key in old.keys() | new.keys()
        if old.get(key) != new.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in _FREE_SETTINGS)
        and not key.endswith((".dirpath", ".num_workers"))
    )
    if changed:
        listed = ", ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed[:5])
        raise ValueError(
            f"{run_dir} was started with other settings ({listed}); use them, or run_name=NAME for another run, or "
            "overwrite=true to set it aside and start afresh"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
