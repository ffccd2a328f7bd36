"""What each option of a command may be: a table. Options that must go together are in checks.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import ListConfig

from consistency.io.run_dir import is_name

_PRECISIONS = ("16-mixed", "16-true", "32", "32-true", "64", "64-true", "bf16", "bf16-mixed", "bf16-true", "16")


class Rule(NamedTuple):
    """What an option may be, as a test and in words."""

    holds: Callable[[Any], bool]
    allowed: str

    def or_null(self, what: str = "") -> Rule:
        """The same, or null."""
        return Rule(lambda value: value is None or self.holds(value), f"{self.allowed}, or null{what}")


def is_number(value: Any) -> bool:
    """Whether this is a finite int or float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def integer(low: int, high: int | None = None) -> Rule:
    """An integer in a range that includes both ends."""
    allowed = f"an integer, at least {low}" + (f" and at most {high}" if high is not None else "")
    return Rule(lambda value: type(value) is int and value >= low and (high is None or value <= high), allowed)


def _one_of(*names: Any) -> Rule:
    *others, last = map(str, names)
    return Rule(lambda value: value in names, f"{', '.join(others)} or {last}")


def _list_of(fits: Callable[[Any], bool], allowed: str, low: int = 0) -> Rule:
    is_list = (list, tuple, ListConfig)
    return Rule(lambda value: isinstance(value, is_list) and len(value) >= low and all(map(fits, value)), allowed)


def _is_devices(value: Any) -> bool:
    if isinstance(value, str):
        return value == "auto" or value.replace(",", "").strip().lstrip("-").isdigit()
    is_list = isinstance(value, list | tuple) and len(value) > 0
    return value == -1 or COUNT.holds(value) or (is_list and all(map(NATURAL.holds, value)))


COUNT, NATURAL = integer(1), integer(0)
FLAG = Rule(lambda value: isinstance(value, bool), "true or false")
TEXT = Rule(lambda value: isinstance(value, str) and value != "", "a name")
POSITIVE = Rule(lambda value: is_number(value) and value > 0, "a positive number")
# Parts of one's own may have none.
IF_THERE = Rule(lambda value: value is None or POSITIVE.holds(value), POSITIVE.allowed)
NOT_NEGATIVE = Rule(lambda value: is_number(value) and value >= 0, "a number, at least 0")
EXISTS = Rule(lambda value: Path(str(value)).exists(), "a file or folder that exists")
SEED, LIGHTNING_SEED = integer(0, 2**63 - 1), integer(0, 2**32 - 1)
GUIDANCE = Rule(is_number, "a number; 1 for none")
COMPILE = Rule(
    lambda value: isinstance(value, bool) or (isinstance(value, str) and value != ""),
    "true, false, a mode such as reduce-overhead or max-autotune, or the name of a backend of torch.compile",
)
RUN_NAME = Rule(is_name, "letters, digits and . , = + - _ (a folder in outputs/)")
_BELOW_ONE: Callable[[Any], bool] = lambda value: is_number(value) and 0 <= value < 1  # noqa: E731
_POSITIVE_COUNTS = _list_of(COUNT.holds, "a list of positive integers", low=1)

_EXECUTION = {"compile": COMPILE, "channels_last": FLAG, "dtype": _one_of("fp32", "bf16", "fp16")}
_MODEL = {"ckpt": TEXT, "out": TEXT, "device": TEXT, "batch_size": COUNT, "seed": SEED, "guidance": GUIDANCE}
_EVALUATE = {
    "reference": EXISTS.or_null(),
    "guidance": GUIDANCE,
    **_EXECUTION,
    "seeds": _list_of(NATURAL.holds, "a list of different integers, e.g. [0,1,2]", low=1),
}
_DATA = {
    "data.batch_size": COUNT,
    "data.image_size": COUNT,
    "data.num_classes": NATURAL,
    "data.num_workers": NATURAL,
    "data.channels": Rule(lambda value: type(value) is int and value in (1, 3), "1 (grey) or 3 (colour)"),
    "data.dataset.limit": COUNT.or_null(" for all images"),
    "data.flip": FLAG,
    "data.on_device": FLAG,
}
_TRAIN = {
    "run_name": RUN_NAME,
    "study_name": RUN_NAME,
    **dict.fromkeys(("overwrite", "estimate", "channels_last", "tf32"), FLAG),
    "compile": COMPILE,
    "randomness": _one_of("per_rank", "per_image", "stratified"),
    "allow_changes": _list_of(lambda key: isinstance(key, str), "a list of options, as [optimizer.lr,trainer.devices]"),
    "seed": LIGHTNING_SEED,
    "metric.c": NOT_NEGATIVE.or_null(" for iCT's"),
    "method.guidance": GUIDANCE,
    "model.sigma_min": IF_THERE,
    "model.sigma_max": IF_THERE,
    "data.sigma_data": IF_THERE,
    "optimizer.lr": POSITIVE,
    "optimizer.betas": Rule(
        lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(_BELOW_ONE, value)),
        "a list of two numbers from 0 to below 1, as [0.9,0.999]",
    ),
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.eps": NOT_NEGATIVE,
    "callbacks.weight_ema.decays": _list_of(_BELOW_ONE, "a list of numbers from 0 to below 1, as [0.9999]"),
    "callbacks.weight_ema.half_lives": _list_of(POSITIVE.holds, "a list of positive numbers of images, as [500000]"),
    "callbacks.sample_grid.num_samples": COUNT,
    "callbacks.sample_grid.every_n_images": NATURAL,
    "callbacks.sample_grid.seed": NATURAL,
    "callbacks.quality.every_n_images": NATURAL,
    "callbacks.quality.seed": NATURAL,
    "callbacks.checkpoint.every_n_steps": COUNT,
    "callbacks.log.every_n_steps": COUNT,
    "callbacks.nonfinite.patience": COUNT,
    "callbacks.nonfinite.wait": FLAG,
    "callbacks.collapse.num_images": COUNT,
    "trainer.max_steps": COUNT,
    "trainer.accelerator": _one_of("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.devices": Rule(_is_devices, "a number of devices, a list of their indices, -1 (all) or auto"),
    "trainer.num_nodes": COUNT,
    "trainer.precision": Rule(lambda value: str(value) in _PRECISIONS, ", ".join(_PRECISIONS)),
    "trainer.gradient_clip_val": NOT_NEGATIVE.or_null(),
    "trainer.accumulate_grad_batches": Rule(
        lambda value: value == "auto" or COUNT.holds(value), f"{COUNT.allowed}, or auto"
    ),
}
RULES: dict[str, dict[str, Rule]] = {
    "train": {**_DATA, **_TRAIN},
    "sample": {
        **_MODEL,
        **_EXECUTION,
        "num_samples": COUNT,
        "trajectory": FLAG,
        "labels": Rule(
            lambda value: not isinstance(value, str) or value == "balanced",
            "a label, a list of labels, balanced, or null for random by seed",
        ),
        "devices": Rule(lambda value: value == "auto" or COUNT.holds(value), f"auto, or {COUNT.allowed}"),
    },
    "edit": {
        **_MODEL,
        "num_images": COUNT,
        "images": EXISTS.or_null(),
        "gif": FLAG,
        "steps": COUNT.or_null(),
        "sigmas": _list_of(is_number, "a list of decreasing noise levels, as [80,0.821]", low=1).or_null(),
    },
    "evaluate": _EVALUATE,
    "search": {**_EVALUATE, "num_levels": integer(3), "parts": COUNT, "seed": NATURAL, "scan": FLAG},
    "curve": {**_EVALUATE, "steps": _POSITIVE_COUNTS, "heun_steps": _POSITIVE_COUNTS},
    "app": {
        **dict.fromkeys(("ckpt", "host", "device"), TEXT),
        "port": integer(1, 65535).or_null(),
        "max_upload_mb": integer(1, 1024),
    },
    "data": {
        "seed": LIGHTNING_SEED,
        "out": Rule(
            lambda value: value is None or (isinstance(value, str) and Path(value).suffix.lower() == ".png"),
            "a name that ends in .png, or null for no grid",
        ),
        **_DATA,
    },
    "convert": {
        "format": _one_of("openai", "edm", "diffusers"),
        "source": TEXT,
        "out": TEXT,
        **dict.fromkeys(("image_size", "head_channels", "num_heads"), COUNT.or_null()),
        **dict.fromkeys(("noise_scale", "sigma_data", "sigma_min", "sigma_max"), POSITIVE.or_null()),
    },
    "export": {"format": _one_of("safetensors", "diffusers"), "ckpt": TEXT, "out": TEXT, "num_levels": integer(2)},
}
