"""What a search searches: parameters in Hydra's override grammar, as distributions of Optuna."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from consistency.config import is_neutral

# Data may have moved; as in runs.folder.check_same_settings.
_MAY_MOVE = ("data.dataset.path",)


def read_space(overrides: Sequence[Override]) -> tuple[list[str], dict[str, Any]]:
    """Divide overrides into fixed ones, as text, and ranges, name -> distribution; of one name the last wins.

    Raises:
        ValueError: if a range cannot be one.
    """
    fixed: dict[str, str] = {}
    space: dict[str, Any] = {}
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


def _distribution(override: Override) -> Any:
    """`choice` and `a,b`: categories, as the text of an override; `range` (its end excluded, as in a grid); `interval`.

    Integers stay integers (`int(interval(1,9))`, both ends included), `tag(log, ...)` searches the logarithm.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if override.is_choice_sweep():
        return CategoricalDistribution(list(dict.fromkeys(override.sweep_string_iterator())))
    sweep: Any = override.value()
    if override.is_range_sweep():
        points, step = sorted(sweep.range()), abs(sweep.step)
        if not points:
            raise ValueError("it has no values")
        low, high = points[0], points[-1]
    else:
        low, high, step = sweep.start, sweep.end, None
    is_log = "log" in sweep.tags
    if all(isinstance(value, int) for value in (low, high, step or 1)):
        return IntDistribution(low, high, log=is_log, step=step or 1)
    return FloatDistribution(float(low), float(high), log=is_log, step=None if step is None else float(step))


def as_override(name: str, value: Any) -> str:
    """One parameter of a trial, exact to the last digit."""
    return f"{name}={value if isinstance(value, str) else repr(value)}"


def check_same_space(trials: Sequence[Any], space: Mapping[str, Any]) -> None:
    """Refuse a space that Optuna cannot join to that of earlier trials; other ends of a range are fine.

    Raises:
        ValueError: for the first parameter with other choices, or of another kind.
    """
    for trial in trials:
        for name, old in trial.distributions.items():
            new = space.get(name, old)
            is_same = type(new) is type(old) and getattr(new, "log", None) == getattr(old, "log", None)
            if not is_same or getattr(new, "choices", None) != getattr(old, "choices", None):
                raise ValueError(
                    f"{name} was searched in {_shown(old)}, now in {_shown(new)}; within a search the ends of a range "
                    "may change, choices and kinds may not: take the old ones, or study_name=NAME for another search"
                )


def _shown(distribution: Any) -> str:
    if hasattr(distribution, "choices"):
        return f"choice({','.join(distribution.choices)})"
    kind = "int(interval" if type(distribution).__name__.startswith("Int") else "interval"
    text = f"{kind}({distribution.low},{distribution.high})" + ")" * kind.startswith("int(")
    return f"tag(log,{text})" if distribution.log else text


def settings_of(config: DictConfig, objective: str | None) -> dict[str, Any]:
    """What all trials of a search share, unresolved: without this, their objectives cannot be compared."""
    tree = {key: value for key, value in _flat(OmegaConf.to_container(config)) if not is_neutral(key)}
    return {key: value for key, value in tree.items() if key not in _MAY_MOVE} | {"objective": objective}


def check_same_settings(old: Mapping[str, Any], new: Mapping[str, Any], searched: set[str]) -> None:
    """Refuse to put trials of other settings into the same search.

    Raises:
        ValueError: with what was, what is, and what to do.
    """
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed := [key for key in keys if not any(key == name or key.startswith(f"{name}.") for name in searched)]:
        listed = ", ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed[:5])
        raise ValueError(
            f"this search was started with other settings ({listed}), its trials would not compare; use them, or "
            "study_name=NAME for another search"
        )


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}".lstrip("."))
    else:
        yield prefix, tree
