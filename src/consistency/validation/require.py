"""The one form of every refusal: what was got, what is allowed, which option to change."""

from __future__ import annotations

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf


def is_number(value: Any) -> bool:
    """Whether this is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_positive(cfg: DictConfig, option: str) -> None:
    """Refuse an option that is not a positive, finite number."""
    value = OmegaConf.select(cfg, option)
    require(is_number(value) and 0 < value < math.inf, option, value, "a positive number")


def require_integer(cfg: DictConfig, option: str, low: int, high: int | None = None) -> None:
    """Refuse an option that is no integer, or out of range."""
    value = OmegaConf.select(cfg, option)
    allowed = f"an integer, at least {low}" + (f" and at most {high}" if high is not None else "")
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    require(is_integer and value >= low and (high is None or value <= high), option, value, allowed)


def require(condition: bool, option: str, got: Any, allowed: str) -> None:
    """Refuse an option in one line.

    Raises:
        ValueError: unless `condition` holds.
    """
    if not condition:
        raise ValueError(f"{option} is {got}; allowed: {allowed}")
