"""What a run returns to a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from consistency.training.health import TrainingLog
from consistency.training.quality import QualityCallback


def check_objective(name: str | None, callbacks: Sequence[Any]) -> None:
    """Refuse an objective that the run will not know.

    Raises:
        ValueError: with the names that it will.
    """
    known = _names(callbacks)
    if name is not None and name not in known:
        raise ValueError(f"objective must be null or one of {', '.join(known)}, got {name}")


def results(name: str | None, callbacks: Sequence[Any]) -> dict[str, Any]:
    """Last scores of a run, and the one that a sweep compares: by default the first, or the loss without any."""
    scores: dict[str, float] = {}
    for callback in callbacks:
        if isinstance(callback, QualityCallback):
            scores = {**callback.last, **scores}
        elif isinstance(callback, TrainingLog) and "loss" in callback.last_row:
            scores["loss"] = callback.last_row["loss"]
    name = name or next(iter(_names(callbacks)), None)
    return {"objective_name": name, "objective": scores.get(name or ""), "scores": scores}


def _names(callbacks: Sequence[Any]) -> list[str]:
    """Names of what the run measures, the default first."""
    scores = [name for callback in callbacks if isinstance(callback, QualityCallback) for name in callback.names]
    has_loss = any(isinstance(callback, TrainingLog) for callback in callbacks)
    return scores + ["loss"] * has_loss
