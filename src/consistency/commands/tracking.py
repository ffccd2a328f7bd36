"""What a run tells W&B of itself, and the end of W&B's run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from consistency.ops import derive_seed
from consistency.training.wandb_logger import WandbLogger
from consistency.training.wandb_session import run_id


def describe_wandb_run(wandb: DictConfig, cfg: DictConfig, run_dir: Path) -> None:
    """Fill in what it is found by: the id, which stays with the run directory, the type of job, the tags."""
    file = run_dir / "wandb_id.txt"
    kept = file.read_text().strip() if file.exists() else ""
    wandb.id = run_id(wandb.id) or kept or f"{derive_seed('wandb', time.time_ns(), os.getpid()):016x}"[-8:]
    if wandb.id != kept:
        run_dir.mkdir(parents=True, exist_ok=True)
        file.write_text(wandb.id)
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    if wandb.get("job_type", "") is None:
        wandb.job_type = choices.get("method") or "train"
    if wandb.get("tags", "") is None:
        wandb.tags = [tag for tag in (choices.get("experiment"), choices.get("data"), cfg.get("variant")) if tag]


def finish_wandb(trainer: L.Trainer) -> None:
    """End the W&B run of this job, however the job ended: the next one of a sweep must not go on in it."""
    method: Any = trainer.lightning_module
    is_over = method is not None and method.progress.is_over
    was_pruned = any(getattr(callback, "pruned", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.finish(exit_code=0 if trainer.state.finished and (is_over or was_pruned) else 1)
