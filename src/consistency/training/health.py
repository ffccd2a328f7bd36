"""What a run reports while it trains: losses, losses per noise level, schedules, gradient norm, throughput."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from consistency.methods.base import Method
from consistency.training.alarms import Collapse, NonFinite
from consistency.training.csv_logger import announce_columns
from consistency.training.triggers import callbacks_of, find_callback

# Edges of ln sigma between the bands of `loss_level_*`: below, between and above these.
LEVEL_EDGES = (0.05, 0.2, 0.8, 3.0, 12.0)


class TrainingLog(Callback):
    """Every n optimizer steps, one row to every logger: means over these steps, not the last value.

    The loss of consistency training says little by itself (it jumps with each change of N(k)); the loss per band of
    sigma and N(k) beside it do. Sums stay on the device, so that logging does not stall it in between.

    Args:
        every_n_steps: Optimizer steps a row.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"every_n_steps must be at least 1, got {every_n_steps}; change callbacks.log.every_n_steps"
            )
        self.every_n_steps = every_n_steps
        self._edges = torch.tensor(LEVEL_EDGES).log()
        self.last_row: dict[str, float] = {}
        self._reduce: Callable[[Tensor], Tensor] | None = None
        self._reset(0, 0)

    def _reset(self, step: int, images: int) -> None:
        self._start_clock(step, images)
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None
        self._grad_norm: Tensor | None = None

    def _start_clock(self, step: int, images: int) -> None:
        self._last_step, self._last_images, self._since = step, images, time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: Method) -> None:
        """Start the clock; an interrupted row continues."""
        announce_columns(trainer, ["loss", *(f"loss_level_{i}" for i in range(len(LEVEL_EDGES) + 1))])
        self._start_clock(pl_module.progress.step, pl_module.progress.images_seen)
        self._edges = self._edges.to(pl_module.device)
        self._reduce = partial(trainer.strategy.reduce, reduce_op="sum")
        if self._sums is not None and self._counts is not None:
            share = 1.0 if trainer.is_global_zero else 0.0  # the row is the first rank's now
            self._sums, self._counts = (
                share * self._sums.to(pl_module.device),
                share * self._counts.to(pl_module.device),
            )

    def state_dict(self) -> dict[str, Any]:
        """Sums of the unfinished row, over all ranks: each of them comes here when a checkpoint is written."""
        if self._sums is None or self._counts is None or self._reduce is None:
            return {"sums": self._sums, "counts": self._counts}
        return {"sums": self._reduce(self._sums), "counts": self._reduce(self._counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the unfinished row."""
        self._sums, self._counts = state_dict["sums"], state_dict["counts"]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Method, optimizer: Any) -> None:
        """Keep the gradient norm of the step that will be logged; unscaled under fp16."""
        if (pl_module.progress.step + 1) % self.every_n_steps == 0:
            grads = [p.grad for p in pl_module.trained_parameters() if p.grad is not None]
            self._grad_norm = torch.nn.utils.get_total_norm(grads)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Method, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up; write a row when it is due."""
        loss, sigma = outputs["per_sample"].float(), outputs["sigma"]
        band = torch.bucketize(sigma.log(), self._edges)
        if self._sums is None or self._counts is None:
            self._sums = torch.zeros(len(LEVEL_EDGES) + 1, device=loss.device)
            self._counts = torch.zeros_like(self._sums)
        self._sums.index_add_(0, band, loss)
        self._counts.index_add_(0, band, torch.ones_like(loss))

        step = pl_module.progress.step
        if step == self._last_step or (step % self.every_n_steps and not pl_module.progress.is_over):
            return
        images = pl_module.progress.images_seen
        seconds = time.perf_counter() - self._since
        reduce = trainer.strategy.reduce  # over ranks; all of them come here in the same step
        sums, counts = (reduce(part, reduce_op="sum").tolist() for part in (self._sums, self._counts))
        row = {"loss": sum(sums) / sum(counts)}
        row |= {f"loss_level_{i}": s / c for i, (s, c) in enumerate(zip(sums, counts, strict=True)) if c}
        row |= {name: float(value) for name, value in outputs["schedule"].items()}
        if self._grad_norm is not None:
            row["grad_norm"] = self._grad_norm.item()
        row["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        row["images_seen"] = images
        row["images_per_second"] = (images - self._last_images) / max(seconds, 1e-9)
        for callback in callbacks_of(trainer):
            if isinstance(callback, NonFinite | Collapse):
                row |= callback.columns(pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
        self.last_row = row
        pl_module.log("loss", row["loss"], on_step=True, on_epoch=False, logger=False, batch_size=1)  # for monitors
        self._reset(step, images)
        # The alarm skips or mends such steps and counts them, and it is the one that says when there are too many.
        if not math.isfinite(row["loss"]) and find_callback(trainer, NonFinite) is None:
            raise FloatingPointError(
                f"the loss is {row['loss']} at step {step}; lower optimizer.lr, or use precision=fp32 if it was fp16"
            )
