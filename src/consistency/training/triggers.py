"""When a callback that looks at the samples does so: every n images and at the end, once each, over all sessions."""

from __future__ import annotations

from typing import Any


class EveryNImages:
    """Due once for each multiple of `every` that is passed, and once at the end of the run.

    `done` belongs into a checkpoint: what was due when a run was stopped is due when it goes on, with the same weights.

    Args:
        every: Images seen between two times; 0 for the end only.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.done = 0  # images seen, the last time

    def is_due(self, progress: Any) -> bool:
        """Whether it is time."""
        if progress.images_seen <= self.done:
            return False
        passed = self.every > 0 and progress.images_seen // self.every > self.done // self.every
        return passed or progress.is_over

    def note(self, progress: Any) -> None:
        """It was done."""
        self.done = progress.images_seen


class EvaluationInterruptedError(Exception):
    """A measurement was broken off because the run was told to stop."""
