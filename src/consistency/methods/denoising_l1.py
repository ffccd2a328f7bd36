"""Denoising in the l1 sense: D is the posterior median of each pixel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from consistency.methods.base import Method, Random, Step
from consistency.methods.metrics import l1
from consistency.models.denoiser import Denoiser
from consistency.ops import add_noise


class DenoisingL1(Method):
    """weight * mean over pixels of |D(x + sigma z; sigma) - x|.

    Args:
        denoiser: D, with its boundary at 0.
        levels: Noise levels sigma [B].
        weighting: `(sigma, sigma) -> [B]`.
        **options: optimizer and lr_schedule, as of `Method`.
    """

    kind = "diffusion"

    def __init__(self, denoiser: Denoiser, *, levels: Any, weighting: Any, **options: Any) -> None:
        super().__init__(denoiser, **options)
        self.levels, self.weighting = levels, weighting

    def step(self, images: Tensor, labels: Tensor, k: int, random: Random) -> Step:
        """The loss of each image and its level."""
        sigma = self.levels(k, random.uniform(images))
        denoised = self.denoiser(add_noise(images, random.normal(images), sigma), sigma, labels)
        return Step(self.weighting(sigma, sigma) * l1(denoised, images), sigma)
