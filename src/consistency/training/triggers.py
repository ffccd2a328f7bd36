"""What callbacks share: finding each other, and a trigger every n images seen that survives a resume."""

from __future__ import annotations

from typing import TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback

from consistency.methods.progress import Progress

T = TypeVar("T", bound=Callback)


def callbacks_of(trainer: L.Trainer) -> list[Callback]:
    """All callbacks of a trainer, in the order in which they are called."""
    return trainer.callbacks  # type: ignore[attr-defined]


def find_callback(trainer: L.Trainer, kind: type[T]) -> T | None:
    """The first callback of a kind."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, kind)), None)


class EveryNImages:
    """Due once for each multiple of `every` that is passed, and once at the end of the run.

    `done` belongs into a checkpoint: what was due when a run was stopped is due when it continues, with the same
    weights.

    Args:
        every: Images seen between two times; 0 for the end only.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.done = 0  # images seen, the last time

    def is_due(self, progress: Progress) -> bool:
        """Whether it is time."""
        if progress.images_seen <= self.done:
            return False
        passed = self.every > 0 and progress.images_seen // self.every > self.done // self.every
        return passed or progress.is_over

    def mark(self, progress: Progress) -> None:
        """Note that it was done."""
        self.done = progress.images_seen


class EvaluationInterruptedError(Exception):
    """A measurement was broken off because the run was asked to stop."""
