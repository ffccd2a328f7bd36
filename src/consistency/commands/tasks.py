"""The tasks of `consistency-edit`: each turns a model and images into columns of a grid, left to right.

A task is `(model, images, **keywords) -> {name: Column}`; the keywords that all share (steps, levels, seed, labels,
guidance) are those of `api.Model`, the others are keys of `conf/task/*.yaml`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from consistency.api import Model, shrink
from consistency.ops import from_uint8, to_uint8
from consistency.sampling.operators import enlarge, grey, hidden, named_mask
from consistency.sampling.wrappers import TURNS, low_pass


class Column(NamedTuple):
    """Images, and how the model drew them; without levels where it did not."""

    images: Tensor
    levels: list[float] = []
    evaluations: int = 0
    labels: list[int] | None = None


Columns = dict[str, Column]


def inpaint(
    model: Model,
    images: Tensor,
    *,
    mask: str = "bottom",
    box: Sequence[int] | None = None,
    fraction: float = 0.5,
    seed: int = 0,
    **keywords: Any,
) -> Columns:
    """Fill what a mask hides; `mask` is a name of `named_mask` or an image file in which white is known."""
    size, is_file = model.image_shape[1], Path(mask).suffix != ""
    if is_file:
        known = read_mask(Path(mask), size).expand(len(images), 1, size, size)
    else:
        known = named_mask(mask, size, box=box, fraction=fraction, seed=seed, num_images=len(images))
        known = known.expand(len(images), 1, size, size)
    if bool(known.all()):
        raise ValueError(f"task.mask={mask} hides nothing: every pixel of it is white, or a transparent one")
    filled = model.inpaint(images, known, seed=seed, **keywords)
    return {"given": Column(hidden(images, known)), "inpainted": drawn(model, filled), "original": Column(images)}


def colorize(model: Model, images: Tensor, **keywords: Any) -> Columns:
    """Colours for the luma of images."""
    colours = model.colorize(images, **keywords)
    return {"given": Column(grey(images)), "colorized": drawn(model, colours), "original": Column(images)}


def superresolve(model: Model, images: Tensor, *, factor: int = 2, **keywords: Any) -> Columns:
    """Images shrunk by `factor` and enlarged again; or small ones, of the model's size divided by it, enlarged."""
    is_small = images.shape[-1] * factor == model.image_shape[1]
    model.check_factor(factor)
    small = images if is_small else shrink(images, factor)
    large = model.superresolve(small, factor, **keywords)
    columns = {"given": Column(enlarge(small, factor)), "enlarged": drawn(model, large)}
    return columns if is_small else {**columns, "original": Column(images)}


def stroke(model: Model, images: Tensor, *, sigma: float | Sequence[float] | None = None, **keywords: Any) -> Columns:
    """SDEdit at one level or several: noise is added to the images, and the model takes it away."""
    columns = {"given": Column(images)}
    for level in _each(sigma):
        edited = model.stroke(images, level, **keywords)
        columns[f"sigma {model.last_levels[0]:g}"] = drawn(model, edited)
    return columns


def translate(model: Model, images: Tensor, *, to: Any, sigma: float | None = None, **keywords: Any) -> Columns:
    """The images as if they had the label `to` (one, or a list that is repeated)."""
    keywords.pop("labels", None)  # their own; they are to have others
    translated = model.translate(images, to, sigma, **keywords)
    return {"given": Column(images), "translated": drawn(model, translated)}


def denoise(
    model: Model,
    images: Tensor,
    *,
    sigma: float | Sequence[float] = 0.5,
    iterate: bool = True,
    steps: int | None = None,
    levels: Sequence[float] | None = None,
    **keywords: Any,
) -> Columns:
    """For each level: the noisy images, their estimate in one evaluation, and with `iterate` step by step."""
    if levels is not None:
        raise ValueError(f"sigmas is {list(levels)}, but task=denoise begins at task.sigma; use steps, or sigmas=null")
    columns: Columns = {}
    for level in _each(sigma):
        name = f"sigma {level:g}"
        columns[f"{name} noisy"] = Column(to_uint8(model.noisy(images, level, seed=keywords.get("seed", 0))))
        columns[f"{name} one step"] = drawn(model, model.denoise(images, level, **keywords))
        if iterate:
            iterated = model.stroke(images, level, steps=steps or 5, **keywords)
            columns[f"{name} iterated"] = drawn(model, iterated)
    return {**columns, "original": Column(images)}


def interpolate(
    model: Model,
    images: Tensor | None,
    *,
    seeds: Sequence[int] = (0, 1),
    num_images: int = 8,
    sigma: float | None = None,
    seed: int = 0,
    **keywords: Any,
) -> Columns:
    """A strip between image 0 of two seeds; with images, between the first two of them (see `Model.morph`)."""
    if images is None:
        if len(seeds) != 2:
            raise ValueError(f"task.seeds is {list(seeds)}; allowed: two seeds, as [0,1]")
        strip = model.interpolate(seeds[0], seeds[1], num_images, **keywords)
    else:
        if len(images) < 2:
            raise ValueError(f"interpolation takes two images, got {len(images)}; change images")
        if isinstance(labels := keywords.get("labels"), Tensor):
            keywords["labels"] = labels[:2]
        strip = model.morph(images[:2], num_images, sigma=sigma, seed=seed, **keywords)
    return {f"{index:02d}": drawn(model, frame[None]) for index, frame in enumerate(strip)}


def anagram(
    model: Model, images: Tensor | None, *, up: int, down: int, turn: str = "flip", num_images: int = 8, **keywords: Any
) -> Columns:
    """Images that are `up` as they stand and `down` when they are turned."""
    _takes_none(images, keywords.pop("labels", None), "anagram", "task.up and task.down")
    upright = model.anagram(up, down, num_images, turn=turn, **keywords)
    return {f"upright ({up})": drawn(model, upright), f"turned ({down})": Column(TURNS[turn](upright))}


def hybrid(
    model: Model, images: Tensor | None, *, far: int, near: int, blur: float = 1.0, num_images: int = 8, **keywords: Any
) -> Columns:
    """Images that are `far` when they are blurred and `near` in their details."""
    _takes_none(images, keywords.pop("labels", None), "hybrid", "task.far and task.near")
    mixed = model.hybrid(far, near, num_images, blur=blur, **keywords)
    floats = from_uint8(mixed)
    low = low_pass(floats, blur)
    columns = {f"hybrid ({far}, {near})": drawn(model, mixed), f"low ({far})": Column(to_uint8(low))}
    return {**columns, f"high ({near})": Column(to_uint8(floats - low))}


def read_mask(path: Path, size: int) -> Tensor:
    """A mask from an image file, white = known; bool [1, 1, size, size].

    Raises:
        ValueError: if it is no image, or of another size.
    """
    from consistency.data.sources import open_image

    image = open_image(path).convert("L")
    if image.size != (size, size):
        raise ValueError(f"task.mask={path} is {image.width} x {image.height}, the model's images are {size} x {size}")
    return torch.from_numpy(np.array(image) > 127)[None, None]


def drawn(model: Model, images: Tensor) -> Column:
    """What the model has just drawn."""
    levels = [round(level, 6) for level in model.last_levels]
    return Column(images, levels, model.last_evaluations, model.last_labels)


def _each(sigma: float | Sequence[float] | None) -> Sequence[Any]:
    """The levels of a task, each once."""
    levels = sigma if isinstance(sigma, Sequence) else [sigma]
    if not levels or len({f"{level:g}" for level in levels if level is not None}) < len([*filter(None, levels)]):
        raise ValueError(f"task.sigma is {list(levels)}; allowed: a noise level, or a list of different ones")
    return levels


def _takes_none(images: Any, labels: Any, task: str, options: str) -> None:
    if images is not None or labels is not None:
        what = "images" if images is not None else "labels"
        raise ValueError(f"task={task} draws its own images of {options}; leave {what} out")
