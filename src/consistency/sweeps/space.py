"""What a search searches: parameters in Hydra's override grammar, as distributions of Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


def read_space(overrides: Sequence[Override]) -> tuple[list[str], dict[str, BaseDistribution]]:
    """Divide overrides into fixed ones, as text, and ranges, name -> distribution; of one name the last wins.

    Raises:
        ValueError: if a range cannot be one.
    """
    fixed: dict[str, str] = {}
    space: dict[str, BaseDistribution] = {}
    for override in overrides:
        name = override.get_key_element()
        fixed.pop(name, None)
        space.pop(name, None)
        if override.is_sweep_override():
            try:
                space[name] = _distribution(override)
            except ValueError as error:
                raise ValueError(f"{override.input_line} is not a range to search: {error}") from None
        else:
            fixed[name] = str(override.input_line)
    return list(fixed.values()), space


def _distribution(override: Override) -> BaseDistribution:
    """`choice` and `a,b`: categories, as the text of an override; `range` (its end excluded, as in a grid); `interval`.

    Integers stay integers (`int(interval(1,9))`, both ends included), `tag(log, ...)` searches the logarithm.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep = override.value()
    if isinstance(sweep, RangeSweep):
        points, step = sorted(sweep.range()), abs(sweep.step)
        if not points:
            raise ValueError("it has no values")
        low, high = points[0], points[-1]
    elif isinstance(sweep, IntervalSweep):
        low, high, step = sweep.start, sweep.end, None
    else:
        return CategoricalDistribution(list(dict.fromkeys(override.sweep_string_iterator())))
    is_log = "log" in sweep.tags
    if isinstance(low, int) and isinstance(high, int) and isinstance(step, int | None):
        return IntDistribution(low, high, log=is_log, step=step or 1)
    return FloatDistribution(float(low), float(high), log=is_log, step=None if step is None else float(step))


def as_override(name: str, value: object) -> str:
    """One parameter of a trial, exact to the last digit."""
    return f"{name}={value if isinstance(value, str) else repr(value)}"
