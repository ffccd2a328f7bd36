"""One progress line: step, images/s, time left, loss and N(k)."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar


class TrainingProgress(ProgressBar):
    """A live bar in a terminal; in a log file, one plain line for every tenth of the run.

    Args:
        refresh_seconds: Least time between two updates in a terminal.
    """

    def __init__(self, refresh_seconds: float = 0.5) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self._enabled = True
        self._bar: Any = None

    def disable(self) -> None:
        """Called by Lightning on ranks other than 0."""
        self._enabled = False

    def enable(self) -> None:
        """Undo `disable`."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Show the bar, from where the run stands."""
        if not self._enabled:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._history: deque[tuple[float, int]] = deque(maxlen=20)
        self._total = pl_module.progress.total_steps or trainer.max_steps
        self._shown_tenth = 10 * pl_module.progress.schedule_step // self._total
        self._next = 0.0
        console = Console()
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[status]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
                speed_estimate_period=60,
            )
            done = pl_module.progress.schedule_step
            self._task = self._bar.add_task("training", total=self._total, completed=done, status="")
            self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update when it is time."""
        if not self._enabled:
            return
        now, step = time.perf_counter(), pl_module.progress.schedule_step
        tenth = 10 * step // self._total
        if not (now >= self._next or step >= self._total if self._bar else tenth > self._shown_tenth):
            return
        self._next, self._shown_tenth = now + self.refresh_seconds, tenth
        self._history.append((now, pl_module.progress.images_seen))
        (start, first), (end, last) = self._history[0], self._history[-1]
        rate = (last - first) / (end - start) if end > start else 0.0
        parts = [f"{rate:,.0f} images/s"] if rate else []
        parts.append(f"loss {outputs['per_sample'].mean().item():.4g}")
        parts += [f"{'N' if name == 'num_levels' else name}={value:g}" for name, value in outputs["schedule"].items()]
        if self._bar:
            self._bar.update(self._task, completed=step, status="  ".join(parts))
        else:
            print(f"step {step}/{self._total}  " + "  ".join(parts), flush=True)

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Leave the last state on screen."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the terminal back."""
        self._stop()
