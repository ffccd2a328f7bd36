"""Ranges of settings whose constructors would fail late, or in other words than the option's name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Rule = tuple[Callable[[Any], bool], str]
_PRECISIONS = ("16-mixed", "16-true", "32", "32-true", "64", "64-true", "bf16", "bf16-mixed", "bf16-true", "16")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any, low: int) -> bool:
    return type(value) is int and value >= low


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(fits(entry) for entry in value)


def _is_devices(value: Any) -> bool:
    if isinstance(value, str):
        return value == "auto" or value.replace(",", "").strip().lstrip("-").isdigit()
    return (
        value == -1
        or _is_integer(value, 1)
        or (_is_list(value, lambda entry: _is_integer(entry, 0)) and len(value) > 0)
    )


_ANY_COUNT: Rule = (lambda value: _is_integer(value, 0), "an integer, at least 0")
_COUNT: Rule = (lambda value: _is_integer(value, 1), "an integer, at least 1")
_NOT_NEGATIVE: Rule = (lambda value: _is_number(value) and value >= 0, "a number, at least 0")
_RULES: dict[str, Rule] = {
    "metric.c": (
        lambda value: value is None or (_is_number(value) and value >= 0),
        "a number, at least 0, or null for iCT's",
    ),
    "callbacks.weight_ema.decays": (
        lambda value: _is_list(value, lambda entry: _is_number(entry) and 0 <= entry < 1),
        "a list of numbers from 0 to below 1, as [0.9999]",
    ),
    "callbacks.weight_ema.half_lives": (
        lambda value: _is_list(value, lambda entry: _is_number(entry) and entry > 0),
        "a list of positive numbers of images, as [500000]",
    ),
    "callbacks.sample_grid.num_samples": _COUNT,
    "callbacks.sample_grid.every_n_images": _ANY_COUNT,
    "callbacks.sample_grid.seed": _ANY_COUNT,
    "callbacks.quality.every_n_images": _ANY_COUNT,
    "callbacks.quality.seed": _ANY_COUNT,
    "callbacks.checkpoint.every_n_steps": _COUNT,
    "callbacks.log.every_n_steps": _COUNT,
    "callbacks.nonfinite.patience": _COUNT,
    "callbacks.nonfinite.wait": (lambda value: isinstance(value, bool), "true or false"),
    "callbacks.collapse.num_images": _COUNT,
    "optimizer.betas": (
        lambda value: _is_list(value, lambda entry: _is_number(entry) and 0 <= entry < 1) and len(value) == 2,
        "a list of two numbers from 0 to below 1, as [0.9,0.999]",
    ),
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.eps": _NOT_NEGATIVE,
    "trainer.accelerator": (
        lambda value: value in ("auto", "cpu", "gpu", "cuda", "mps"),
        "auto, cpu, gpu, cuda or mps",
    ),
    "trainer.devices": (_is_devices, "a number of devices, a list of their indices, -1 (all) or auto"),
    "trainer.num_nodes": _COUNT,
    "trainer.precision": (lambda value: str(value) in _PRECISIONS, ", ".join(_PRECISIONS)),
    "trainer.gradient_clip_val": (
        lambda value: value is None or (_is_number(value) and value >= 0),
        "a number, at least 0, or null",
    ),
}


def check_ranges(settings: dict[str, Any]) -> None:
    """Check the settings that are there against the rules.

    Raises:
        ValueError: with the option's name, what was got and what is allowed.
    """
    for option, (holds, allowed) in _RULES.items():
        node: Any = settings
        for key in option.split("."):
            node = node.get(key, _ABSENT) if isinstance(node, dict) else _ABSENT
        if node is not _ABSENT and not holds(node):
            raise ValueError(f"{option} is {node}; allowed: {allowed}")


_ABSENT: Any = object()
