"""The progress of training: step, images/s, time left, loss and N(k)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch import callbacks

from consistency.io.progress import ProgressBar
from consistency.methods.base import Method


class TrainingProgress(callbacks.ProgressBar):
    """A live bar in a terminal; in a log file, one plain line for every tenth of the run.

    Args:
        refresh_seconds: Least time between two updates in a terminal.
    """

    def __init__(self, refresh_seconds: float = 0.5) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self.bar: ProgressBar | None = None
        self._is_enabled = True

    def disable(self) -> None:
        """Called by Lightning on ranks other than 0."""
        self._is_enabled = False

    def enable(self) -> None:
        """Undo `disable`."""
        self._is_enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: Method) -> None:
        """Show the bar, from where the run stands."""
        if self._is_enabled:
            total, done = pl_module.progress.total_steps or trainer.max_steps, pl_module.progress.schedule_step
            options = {"refresh_seconds": self.refresh_seconds, "line_seconds": 0.0}
            self.bar = ProgressBar("step", total, done, file=sys.stdout, keep=True, **options)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Method, outputs: Mapping[str, Any], batch: Any, batch_idx: int
    ) -> None:
        """Update when it is time."""
        if self.bar is not None:
            progress = pl_module.progress
            self.bar.advance(progress.schedule_step, progress.images_seen, lambda: _status(outputs))

    def on_train_end(self, trainer: L.Trainer, pl_module: Method) -> None:
        """Leave the last state on screen, and give the terminal back."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: Method, exception: BaseException) -> None:
        """Give the terminal back."""
        self.on_train_end(trainer, pl_module)


def _status(outputs: Mapping[str, Any]) -> str:
    parts = [f"loss {outputs['per_sample'].mean().item():.4g}"]
    parts += [f"{'N' if name == 'num_levels' else name}={value:g}" for name, value in outputs["schedule"].items()]
    return "  ".join(parts)
