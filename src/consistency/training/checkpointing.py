"""The run's own checkpoints, and stopping cleanly when a person or a scheduler asks for it."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from consistency.io.atomic import atomic_replace, checkpoint_manifest, verify_zip
from consistency.methods.base import Method
from consistency.methods.progress import set_options
from consistency.training.triggers import callbacks_of

# Ctrl-C; the end of a job; the warning before it that SLURM sends with `--signal=USR1@90`.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class RunCheckpoint(Checkpoint):
    """Write `last.ckpt` every n optimizer steps, at the end, and when asked to stop; keep the one before it.

    Ctrl-C, SIGTERM and SIGUSR1 do not break into a step: it ends, the checkpoint is written, training stops, and
    `interrupted_by` holds the signal's number. A second Ctrl-C stops at once. Checkpoints are only written between
    optimizer steps, so that a resumed run equals a straight one. A new file is written beside, its checksums are
    compared, and it takes its place in one rename; never when the weights are not finite.

    Args:
        dirpath: Folder of `last.ckpt` and `previous.ckpt`.
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
        self._partial = self.path.with_suffix(".partial")
        self._last_step = self._saved_step = 0
        self._options: list[dict[str, Any]] = []  # of each parameter group, as this session's configuration has them
        self._has_loaded = False
        self._earlier_seconds, self._started = 0.0, time.perf_counter()
        self._previous_handlers: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: Method, stage: str) -> None:
        """Write files by ourselves: Lightning copies them through memory and TMPDIR, and hides some errors."""
        trainer.strategy.checkpoint_io = _OneFile()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Method, checkpoint: dict[str, Any]) -> None:
        """Continue with another number of micro-batches or another batch, where this session has one."""
        self._has_loaded = True
        micro_batches = checkpoint.get("consistency", {}).get("accumulate_grad_batches")
        if micro_batches not in (None, trainer.accumulate_grad_batches):
            # Lightning steps after every n-th micro-batch by its own count, which has to begin with a step.
            checkpoint.pop("loops", None)
        if pl_module.progress.was_converted:
            for schedule in checkpoint["lr_schedulers"]:
                schedule["last_epoch"] = pl_module.progress.schedule_step

    def on_fit_start(self, trainer: L.Trainer, pl_module: Method) -> None:
        """Make the folder; note the optimizer's options before those of the checkpoint replace them."""
        self.interrupted_by = None
        self._options = [
            {**group, "lr": group.get("initial_lr", group["lr"])} for group in trainer.optimizers[0].param_groups
        ]
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.unlink(missing_ok=True)  # of a process that was killed

    def on_train_start(self, trainer: L.Trainer, pl_module: Method) -> None:
        """Start the clock; stop where that was asked for already."""
        self.install_signal_handlers()
        if self._has_loaded:  # allow_changes=[optimizer.lr]
            schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
            set_options(trainer.optimizers[0], schedules, self._options)
        self._last_step = self._saved_step = pl_module.progress.step
        self._started = time.perf_counter()
        self._stop_if_asked(trainer)

    def install_signal_handlers(self) -> None:
        """Hear the signals from now on. Not before `on_train_start`: Lightning sets handlers of its own until then."""
        if threading.current_thread() is threading.main_thread() and not self._previous_handlers:
            for number in STOP_SIGNALS:
                self._previous_handlers[number] = signal.signal(number, self._handle_signal)

    def _handle_signal(self, number: int, frame: Any) -> None:
        if self.interrupted_by is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.interrupted_by = number

    def _restore_signal_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def _is_asked_to_stop(self, trainer: L.Trainer) -> bool:
        """On any rank: every rank must take the same branch, or the others wait for ever."""
        return trainer.strategy.reduce_boolean_decision(self.interrupted_by is not None, all=False)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        if self._is_asked_to_stop(trainer):
            self.interrupted_by = self.interrupted_by or signal.SIGTERM
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Method, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is due; stop when asked."""
        step, is_over = pl_module.progress.step, pl_module.progress.is_over
        if step == self._last_step:
            return
        self._last_step = step
        if self._is_asked_to_stop(trainer) or step % self.every_n_steps == 0 or is_over:
            self.save(trainer)
        if is_over and not any(getattr(one, "has_deferred_evaluation", False) for one in callbacks_of(trainer)):
            self.interrupted_by = None  # asked to stop in the last step: nothing was cut short
        else:
            self._stop_if_asked(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write beside, compare checksums, keep the one before, rename.

        Raises:
            FloatingPointError: if a weight is not finite; the earlier checkpoints stay.
            OSError: if it cannot be written; the earlier checkpoints stay.
        """
        method: Any = trainer.lightning_module
        if not all(parameter.isfinite().all() for parameter in method.parameters()):
            raise FloatingPointError(
                f"the weights are not finite any more, {self.path} was not written; lower optimizer.lr, or use "
                "precision=fp32 if this run used fp16"
            )
        trainer.save_checkpoint(self._partial)
        if trainer.is_global_zero:
            if (damage := verify_zip(self._partial)) is not None:
                raise OSError(
                    f"{self._partial} does not read back ({damage}): the disk or memory is not sound; "
                    f"{self.path} is as it was"
                )
            # A step that is saved twice (before an evaluation and after it) is kept once.
            if self.path.exists() and method.progress.step != self._saved_step:
                os.replace(self.path, self.path.with_name("previous.ckpt"))
            atomic_replace(self._partial, self.path)
        self._saved_step = method.progress.step
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

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Method, checkpoint: dict[str, Any]) -> None:
        """Add under our own key `metadata` (plain values), what the run is divided into, and the list of parts."""
        checkpoint["consistency"] = {
            **self.metadata,
            "world_size": trainer.world_size,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "parts": checkpoint_manifest(checkpoint),
        }

    def on_train_end(self, trainer: L.Trainer, pl_module: Method) -> None:
        """Keep what a limit such as max_time has ended; give the signals back."""
        if pl_module.progress.step != self._saved_step and not pl_module.progress.pending:
            self.save(trainer)
        self._restore_signal_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: Method, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore_signal_handlers()


class _OneFile(TorchCheckpointIO):
    """Straight into the file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write it.

        Raises:
            OSError: if that fails; nothing is left of the attempt.
        """
        path = Path(path)
        try:
            with path.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())  # what is read back comes from the disk, or at least has reached it
        except (OSError, RuntimeError) as error:  # torch has its own word for a full disk
            with suppress(OSError):
                path.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__
            raise OSError(
                f"the checkpoint could not be written to {path.parent} ({getattr(cause, 'strerror', None) or error}); "
                "the earlier ones are as they were. Free space or bring the folder back, and the same command continues"
            ) from error
