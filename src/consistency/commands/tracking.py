"""What a run's W&B page says of it, and its end."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from consistency.training.wandb_logger import WandbLogger


def describe_wandb_run(wandb: DictConfig, cfg: DictConfig, run_dir: Path) -> None:
    """Fill in the id, which stays with the run directory (a sweep's agent gives its own), the job type and the tags."""
    file = run_dir / "wandb_id.txt"
    kept = file.read_text().strip() if file.exists() else ""
    wandb.id = os.environ.get("WANDB_RUN_ID") or wandb.id or kept or secrets.token_hex(4)
    if wandb.id != kept:
        run_dir.mkdir(parents=True, exist_ok=True)
        file.write_text(wandb.id)
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    if wandb.get("job_type", "") is None:
        wandb.job_type = choices.get("method") or "train"
    if wandb.get("tags", "") is None:
        wandb.tags = [tag for tag in (choices.get("experiment"), choices.get("data"), cfg.get("variant")) if tag]


def typed_overrides() -> dict[str, str]:
    """The overrides of the command line, to group and filter runs by: {"metric": "l2", "optimizer.lr": "1e-4"}."""
    typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    pairs = (override.lstrip("+~").partition("=") for override in typed)
    return {key: value for key, _, value in pairs}


def finish_wandb(trainer: L.Trainer) -> None:
    """End the W&B run of this job, however the job ended."""
    method: Any = trainer.lightning_module
    is_over = method is not None and method.progress.is_over
    was_pruned = any(getattr(callback, "pruned", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.finish(exit_code=0 if trainer.state.finished and (is_over or was_pruned) else 1)
