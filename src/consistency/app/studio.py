"""What the page asks of a model: checked, one request at a time, timed. Knows no web server."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consistency.api import shrink
from consistency.app.pictures import painted
from consistency.data.image_files import image_grid
from consistency.io.safe_load import first_line
from consistency.sampling.operators import enlarge, hidden

log = logging.getLogger(__name__)

AUTO = "auto"  # the label: random by seed for new images, none or guessed for edits
MAX_STEPS, MAX_IMAGES, MAX_SEED, MAX_GUIDANCE = 64, 64, 2**32 - 1, 20.0
_WIDTH = 480  # of a result on the page, in screen pixels; small images fill it by whole pixels


@dataclass(frozen=True)
class Settings:
    """What all requests share, as the page sent it; `Studio` checks it."""

    steps: Any = 1
    label: Any = AUTO
    seed: Any = 0
    guidance: Any = 1.0


@dataclass(frozen=True)
class Answer:
    """What a request gives: images uint8 [N, C, H, W] (None where it failed), and one line."""

    images: Tensor | None
    line: str

    def picture(self) -> Any:
        """uint8 array [H', W', 3] of all images, a nearly square grid; None where there are none."""
        if self.images is None:
            return None
        columns = math.ceil(len(self.images) ** 0.5) if len(self.images) > 3 else len(self.images)
        cell = max(_WIDTH // columns // self.images.shape[-1], 1) * self.images.shape[-1]  # image_grid rounds up
        return image_grid(self.images, columns, cell).permute(1, 2, 0).contiguous().numpy()


class Studio:
    """A model (`consistency.load`) behind checks and a lock.

    Every request returns an `Answer` and raises nothing: what is wrong is its one line.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.channels, self.height, self.width = self.shape = model.image_shape
        self.factors = [n for n in range(2, self.width // 2 + 1) if self.width % n == 0]
        self._lock = threading.Lock()

    def labels(self) -> list[str]:
        """What the page offers; empty for unconditional models."""
        classes = self.model.num_classes
        return [AUTO, *map(str, range(classes))] if classes else []

    def sample(self, number: Any, settings: Settings) -> Answer:
        """Images of a seed."""
        return self._answer(
            lambda: self.model.sample(_integer("images", number, 1, MAX_IMAGES), **self._checked(settings))
        )

    def inpaint(self, image: Tensor | None, drawing: Tensor, settings: Settings) -> Answer:
        """Fill what was drawn over, on an image [C, H, W]; shown: the image with the hole in grey, and the result."""

        def work() -> Tensor:
            source, known = _given(image), drawing[3] == 0
            if bool(known.all()):
                raise ValueError("nothing is drawn on the image; draw over what is to be filled")
            filled = self.model.inpaint(source[None], known, **self._checked(settings))
            return torch.cat([hidden(source[None], known), filled])

        return self._answer(work)

    def colorize(self, image: Tensor | None, settings: Settings) -> Answer:
        """Colours from the grey of an image; shown: the grey, and the result."""

        def work() -> Tensor:
            source = _given(image)
            coloured = self.model.colorize(source[None], **self._checked(settings))
            opaque = torch.cat([source.expand(3, -1, -1), torch.full_like(source[:1], 255)])
            return torch.cat([painted(None, opaque, 1).expand_as(source)[None], coloured])

        return self._answer(work)

    def superresolve(self, image: Tensor | None, factor: Any, settings: Settings) -> Answer:
        """An image shrunk by boxes and restored; shown: the small one, the result, the image itself."""

        def work() -> Tensor:
            source = _given(image)
            if str(factor) not in map(str, self.factors):
                raise ValueError(f"factor is {factor}; allowed: {', '.join(map(str, self.factors))}")
            small = shrink(source[None], int(factor))
            large = self.model.superresolve(small, int(factor), **self._checked(settings))
            return torch.cat([enlarge(small, int(factor)), large, source[None]])

        return self._answer(work)

    def stroke(self, image: Tensor | None, drawing: Tensor, sigma: Any, settings: Settings) -> Answer:
        """A painting (over an image, or on black) into an image of the model; shown: the painting, and the result."""

        def work() -> Tensor:
            level = _number("noise level", sigma, 0.01, 80.0)
            painting = painted(image, drawing, self.channels)[None]
            return torch.cat([painting, self.model.stroke(painting, sigma=level, **self._checked(settings))])

        return self._answer(work)

    def interpolate(self, seed_b: Any, point: Any, settings: Settings) -> Answer:
        """The image at `point` in [0, 1] between two seeds."""

        def work() -> Tensor:
            place, end = _number("point", point, 0.0, 1.0), _integer("second seed", seed_b, 0, MAX_SEED)
            checked = self._checked(settings)
            return self.model.interpolate(checked.pop("seed"), end, places=[place], **checked)

        return self._answer(work)

    def _checked(self, settings: Settings) -> dict[str, Any]:
        """The keywords that all methods of the model share."""
        checked: dict[str, Any] = {
            "steps": _integer("steps", settings.steps, 1, MAX_STEPS),
            "seed": _integer("seed", settings.seed, 0, MAX_SEED),
        }
        labels = self.labels()
        if labels and settings.label != AUTO:
            if str(settings.label) not in labels:
                raise ValueError(f"label is {settings.label}; allowed: {AUTO} or 0 to {len(labels) - 2}")
            checked["labels"] = int(settings.label)
        if self.model.can_guide:
            checked["guidance"] = _number("guidance", settings.guidance, 0.0, MAX_GUIDANCE)
        return checked

    def _answer(self, work: Callable[[], Tensor]) -> Answer:
        """Do the work alone; time it and count the network's evaluations, or say in one line what was wrong."""
        with self._lock:
            start = time.perf_counter()
            try:
                images = work()
            except ValueError as error:
                return Answer(None, first_line(error))
            except Exception as error:  # of the model at work; the page lives on
                log.exception("a request of the page failed")
                return Answer(None, f"failed: {first_line(error)}; the terminal has the details")
            milliseconds = 1000 * (time.perf_counter() - start)
        calls = self.model.last_evaluations
        evaluations = "1 network evaluation" if calls == 1 else f"{calls} network evaluations"
        return Answer(images, f"{milliseconds:.0f} ms, {evaluations}, {self.model.device}")


def _given(image: Tensor | None) -> Tensor:
    if image is None:
        raise ValueError("there is no image; take a sample or upload one")
    return image


def _integer(name: str, value: Any, low: int, high: int) -> int:
    is_integer = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not is_integer or not low <= value <= high:
        raise ValueError(f"{name} is {value}; allowed: an integer from {low} to {high}")
    return int(value)


def _number(name: str, value: Any, low: float, high: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # a nan is in no range
        raise ValueError(f"{name} is {value}; allowed: a number from {low:g} to {high:g}")
    return float(value)
