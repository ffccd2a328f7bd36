"""The run's own checkpoint, and stopping cleanly on Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint


class RunCheckpoint(Checkpoint):
    """Write `last.ckpt` every n optimizer steps, at the end, and when asked to stop.

    Ctrl-C and SIGTERM do not break into a step: it ends, the checkpoint is written, training stops, and
    `interrupted_by` holds the signal's number. A second Ctrl-C stops at once. Checkpoints are only written between
    optimizer steps, so that a resumed run equals a straight one. The new file replaces the old one in one rename, and
    never when the weights are not finite.

    Args:
        dirpath: Folder of the checkpoint.
        every_n_steps: Optimizer steps between two writes.
    """

    def __init__(self, dirpath: str, every_n_steps: int = 1000) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}; change callbacks.checkpoint")
        self.path = Path(dirpath) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self.interrupted_by: int | None = None
        self.metadata: dict[str, Any] = {}
        self._last_step = 0
        self._earlier_seconds, self._started = 0.0, time.perf_counter()
        self._previous_handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Listen for signals."""
        self._last_step, self._started = pl_module.progress.step, time.perf_counter()
        self.interrupted_by = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.interrupted_by is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.interrupted_by = number

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save when it is due; stop when asked."""
        step = pl_module.progress.step
        if step == self._last_step:
            return
        self._last_step = step
        # Every rank must take the same branch, or the others wait for ever.
        stop = trainer.strategy.reduce_boolean_decision(self.interrupted_by is not None, all=False)
        if stop or step % self.every_n_steps == 0 or pl_module.progress.is_over:
            self.save(trainer)
        if pl_module.progress.is_over:
            self.interrupted_by = None  # asked to stop in the last step: nothing was cut short
        elif stop:
            self.interrupted_by = self.interrupted_by or signal.SIGTERM
            trainer.should_stop = True

    def save(self, trainer: L.Trainer) -> None:
        """Write beside, flush to disk, rename.

        Raises:
            FloatingPointError: if a weight is not finite; the earlier checkpoint stays.
        """
        norms = torch._foreach_norm(list(trainer.lightning_module.parameters()))
        if not torch.stack(norms).isfinite().all():
            raise FloatingPointError(
                f"the weights are not finite any more, {self.path} was not written; lower optimizer.lr, or use "
                "precision=fp32 if this run used fp16"
            )
        partial = self.path.with_suffix(".partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, self.path)
        trainer.strategy.barrier()

    @property
    def seconds(self) -> float:
        """Time spent training, earlier sessions of the run included."""
        return self._earlier_seconds + time.perf_counter() - self._started

    def state_dict(self) -> dict[str, float]:
        """The time so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Restore the time of earlier sessions."""
        self._earlier_seconds = state_dict["seconds"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add `metadata` (plain values: the resolved configuration, the method) under our own key."""
        checkpoint["consistency"] = self.metadata

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Give the signals back."""
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore_handlers()
