"""The settings of runs, as far as they make a result: how they compare, and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from consistency.config import is_neutral
from consistency.report.logs import number
from consistency.report.study import Run

_IDENTITY = ("seed", "variant")  # beside the neutral settings
_HYDRA = ("_partial_", "_convert_", "_recursive_")
NONE, UNKNOWN = "none", "?"  # a setting that is null or absent; one of a run that left no settings

Settings = dict[str, Any]  # "metric" -> Target, "optimizer.lr" -> 0.001; null is left out


class Target(str):
    """Dotted path of a part: compared whole, shown by its last name."""

    __slots__ = ()


def compared_settings(runs: Sequence[Run]) -> list[Settings | None]:
    """The settings that make the result of each run: without seed, names, paths, and what follows other settings."""
    having: dict[str, set[str | None]] = {}
    for run in runs:
        for key in run.settings or ():
            parts = key.split(".")
            prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
            followed = next((run.references[prefix] for prefix in prefixes if prefix in run.references), None)
            having.setdefault(key, set()).add(followed)
    # Where runs follow different settings, as `${curriculum.start}` and `${curriculum.end}`, that is a difference.
    follows = {key for key, followed in having.items() if len(followed) == 1 and None not in followed}
    return [None if run.settings is None else dict(_own(run, follows)) for run in runs]


def _own(run: Run, follows: set[str]) -> list[tuple[str, Any]]:
    settings = run.settings or {}
    folder, own = settings.get("paths.output_dir"), []
    for key, value in settings.items():
        name = key.rpartition(".")[2]
        if value is None or key in follows or key in _IDENTITY or name in _HYDRA or is_neutral(key):
            continue
        # The same without `.hydra/`: a seed that is the run's, a file in the run's directory.
        if (name == "seed" and value == run.seed) or (folder and isinstance(value, str) and str(folder) in value):
            continue
        own.append((key.removesuffix("._target_"), Target(value) if name == "_target_" else _plain(value)))
    return own


def _plain(value: Any) -> Any:
    """1 and 1.0 compare as equal; a list is its text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value if isinstance(value, str | bool) else json.dumps(value, default=str)


def typed_for(overrides: Sequence[str], *, axes_only: bool = False) -> dict[str, str]:
    """What was typed for a run, and changes its result; `axes_only`: without what its variant sets."""
    typed: dict[str, str] = {}
    for entry in overrides:
        key, _, value = entry.lstrip("+~").partition("=")
        if axes_only and key == "variant":
            break
        if key not in _IDENTITY and not is_neutral(key) and not key.startswith("hydra"):
            typed[key] = value
    return typed


def shown(value: Any) -> str:
    """A setting in a table."""
    if value is None:
        return NONE
    if isinstance(value, Target):
        return value.rpartition(".")[2]
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def numeric(values: Sequence[str]) -> list[float] | None:
    """The values as numbers; None if one is not."""
    numbers = [number(value) for value in values]
    finite = [value for value in numbers if value is not None and abs(value) < float("inf")]
    return finite if len(finite) == len(numbers) else None
