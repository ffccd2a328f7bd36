"""EDM: denoising score matching (Karras et al. 2022). Its models are samplers' denoisers and CD's teachers.

Flow matching (method=flow) is this class with other parts: t uniform, the velocity as output and in the weighting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from consistency.methods.base import Method, Random, Step
from consistency.methods.metrics import l2
from consistency.models.denoiser import Denoiser
from consistency.noise.levels import check_gives
from consistency.ops import add_noise


class EDM(Method):
    """Train D(x; sigma) to remove noise: weight * mean over pixels of (D(x + sigma z; sigma) - x)^2 (EDM, Eq. 2).

    The mean over pixels is OpenAI's convention, NVlabs sums: with Adam and RAdam only the loss plot differs.

    Args:
        denoiser: D, with its boundary at 0.
        levels: Noise levels sigma [B]; see `noise.levels`.
        weighting: `(sigma, sigma) -> [B]`.
        **options: optimizer and lr_schedule, as of `Method`.

    Raises:
        ValueError: if the denoiser is a consistency function (its boundary is not at 0), or `levels` gives pairs.
    """

    kind = "diffusion"
    takes_augment_labels = True

    def __init__(
        self, denoiser: Denoiser, *, levels: Any, weighting: Callable[[Tensor, Tensor], Tensor], **options: Any
    ) -> None:
        super().__init__(denoiser, **options)
        check_gives(levels, "level", type(self).__name__)
        if getattr(getattr(weighting, "func", weighting), "needs_pairs", False):
            allowed = "uniform, edm, snr, snr_plus_one, truncated_snr or velocity"
            raise ValueError(f"weighting is inverse_gap, which needs pairs of levels; allowed with EDM: {allowed}")
        self.levels, self.weighting = levels, weighting

    def step(
        self, images: Tensor, labels: Tensor, k: int, random: Random, augment_labels: Tensor | None = None
    ) -> Step:
        """The denoising loss; `augment_labels` [B, 9] say what was done to the images."""
        sigma = self.levels(k, random.uniform(images))
        extra = {} if augment_labels is None else {"augment_labels": augment_labels}
        denoised = self.denoiser(add_noise(images, random.normal(images), sigma), sigma, labels, **extra)
        return Step(self.weighting(sigma, sigma) * l2(denoised, images), sigma)
