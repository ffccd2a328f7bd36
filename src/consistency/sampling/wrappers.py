"""Denoisers made of a denoiser: guided, with a known part, or looking at an image in two ways.

Each answers `(x, sigma, labels) -> [B, C, H, W]`, so that every sampler takes it in place of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from consistency.models.denoiser import Denoiser

Replace = Callable[[Tensor], Tensor]


class DenoiserWrapper:
    """Another way to ask a denoiser; everything but the answer is the denoiser's own (sigma_min, num_classes, ...)."""

    def __init__(self, denoiser: Any, answer: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        self.denoiser, self._answer = denoiser, answer

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """The estimate of the clean image; [B, C, H, W]."""
        return self._answer(x, sigma, labels)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)


def in_full_batches(denoiser: Any, batch_size: int) -> DenoiserWrapper:
    """The denoiser, asked for `batch_size` images each time: what lacks is filled with copies of the last image.

    A compiled network would be compiled once more for the last batch, which is smaller, and captured once more in CUDA
    graphs; to draw a few images too many costs less than a minute of that.
    """

    def answer(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        count = len(x)
        if count >= batch_size:
            return denoiser(x, sigma, labels)
        rows = torch.arange(batch_size, device=x.device).clamp(max=count - 1)
        return denoiser(x[rows], sigma[rows], None if labels is None else labels[rows])[:count]

    return DenoiserWrapper(denoiser, answer)


def guided(denoiser: Denoiser, weight: float) -> Any:
    """Classifier-free guidance: D_u + weight (D_c - D_u), two evaluations (Ho & Salimans 2022).

    D of a diffusion model is linear in the noise estimate and in the velocity: guiding any of them is the same. With a
    consistency model the formula goes past the end points of two trajectories; it works, but follows from nothing.

    Args:
        denoiser: A class-conditional model, trained with `model.label_dropout` above 0.
        weight: 1 is the conditional model, 0 the unconditional one; above 1 labels are obeyed more, variety shrinks.

    Raises:
        ValueError: if the model cannot be guided.
    """
    if weight == 1:
        return denoiser
    if not math.isfinite(weight):
        raise ValueError(f"guidance must be a finite number, got {weight}; 1 is none")
    if not (denoiser.num_classes and denoiser.label_dropout > 0):
        what = "has no labels" if not denoiser.num_classes else "never saw an image without its label"
        allowed = "guidance=1, or a model trained with model.label_dropout=0.1"
        raise ValueError(f"guidance is {weight}, but the model {what}; use {allowed}")

    def answer(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError("guidance needs labels")
        unconditional = denoiser(x, sigma, torch.full_like(labels, -1))
        return unconditional + weight * (denoiser(x, sigma, labels) - unconditional)

    return DenoiserWrapper(denoiser, answer)


def with_replacement(denoiser: Any, replace: Replace) -> DenoiserWrapper:
    """The known part of the image is put back into every estimate (CM, Alg. 4): in clean space, before noise is added.

    The estimate is first cut to [-1, 1], as in the paper's code; sampling does not cut.

    Args:
        denoiser: A model or a view of one.
        replace: Estimate [B, C, H, W] -> the same with its known part; see `sampling.known`.
    """
    return DenoiserWrapper(denoiser, lambda x, sigma, labels: replace(denoiser(x, sigma, labels).clamp(-1, 1)))


def anagram(denoiser: Any, other_labels: Tensor, turn: Replace) -> DenoiserWrapper:
    """One image that is `labels` upright and `other_labels` turned: the average of both estimates (Geng et al. 2024).

    Args:
        denoiser: A class-conditional model, or a guided one.
        other_labels: [B] int64, of the turned image.
        turn: Its own inverse, on [B, C, H, W]: `flip`, `mirror` or `rotate`.
    """

    def answer(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        return (denoiser(x, sigma, labels) + turn(denoiser(turn(x), sigma, other_labels))) / 2

    return DenoiserWrapper(denoiser, answer)


def hybrid(denoiser: Any, near_labels: Tensor, blur: float) -> DenoiserWrapper:
    """One image that is `labels` from afar and `near_labels` from near: low and high frequencies of two estimates.

    Args:
        denoiser: A class-conditional model, or a guided one.
        near_labels: [B] int64, of the high frequencies.
        blur: Standard deviation of the Gaussian that parts the frequencies, in pixels.
    """

    def answer(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        near = denoiser(x, sigma, near_labels)
        return low_pass(denoiser(x, sigma, labels), blur) + near - low_pass(near, blur)

    return DenoiserWrapper(denoiser, answer)


def low_pass(images: Tensor, blur: float) -> Tensor:
    """Gaussian blur of standard deviation `blur` pixels, reflected at the borders; [B, C, H, W]."""
    reach = min(math.ceil(3 * blur), min(images.shape[-2:]) - 1)  # as far as reflection goes
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    taps = torch.exp(-0.5 * (offsets / blur) ** 2)
    taps = (taps / taps.sum()).expand(images.shape[1], 1, 1, -1)
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    rows = F.conv2d(padded, taps, groups=images.shape[1])
    return F.conv2d(rows, taps.transpose(-1, -2), groups=images.shape[1])


def project_onto_constraint(x: Tensor, replace: Replace, rounds: int = 20) -> Tensor:
    """An edited image within [-1, 1] that still has its known part: what is cut off is put back, again and again.

    What is known of an image is an affine space, and the range a box: alternating projections, which end where both
    hold. Without it, cutting moves the luma or the means that an edit has kept by many grey levels.
    """
    for _ in range(rounds):
        x = replace(x.clamp(-1, 1))
    return x


def flip(x: Tensor) -> Tensor:
    """Upside down."""
    return x.flip(-2)


def mirror(x: Tensor) -> Tensor:
    """Left to right."""
    return x.flip(-1)


def rotate(x: Tensor) -> Tensor:
    """By 180 degrees."""
    return x.flip((-2, -1))


TURNS = {"flip": flip, "mirror": mirror, "rotate": rotate}  # each its own inverse
