"""Random numbers of a training step: those of a rank, or those of its images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from consistency.ops import send


class Random:
    """Random numbers of a micro-batch, from torch's global state; `StepSeeds` seeds that anew for each.

    Args:
        strata: (rank, number of ranks): `uniform` then has one u in each of as many equal intervals as there are images
            on all ranks, in place of independent ones: the same distribution, and less variance of a batch's loss.
            None: independent.
    """

    def __init__(self, strata: tuple[int, int] | None = None) -> None:
        self.strata = strata

    def uniform(self, x: Tensor) -> Tensor:
        """u in [0, 1) for each image of x; [B] on the device of x, float64 (float32 on MPS, which has no other)."""
        u = self._rand(len(x))
        if self.strata is not None:
            rank, ranks = self.strata
            u = (torch.arange(len(x)) * ranks + rank + u) / (ranks * len(x))  # interleaved: no rank has low levels only
        u = u.float() if x.device.type == "mps" else u
        return send(u.clamp(max=1 - torch.finfo(u.dtype).eps / 2), x.device)  # rounding must not make it 1

    def normal(self, x: Tensor) -> Tensor:
        """z ~ N(0, I), like x."""
        return torch.randn_like(x)

    def coin(self, x: Tensor, probability: float) -> Tensor:
        """True with that probability for each image, independent even where `uniform` is stratified; bool [B]."""
        return send(self._rand(len(x)) < probability, x.device)

    def _rand(self, count: int) -> Tensor:
        return torch.rand(count, dtype=torch.float64)


class RandomOfImages(Random):
    """Random numbers that belong to images: whatever the ranks and micro-batches, an image draws the same.

    Args:
        seeds: Of the images of the micro-batch.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__()
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def normal(self, x: Tensor) -> Tensor:
        """z ~ N(0, I), like x; drawn on the CPU, so that every device gets the same numbers."""
        noise = torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in self._generators])
        return send(noise, x.device).to(x.dtype)

    def _rand(self, count: int) -> Tensor:
        draws = [torch.rand(1, dtype=torch.float64, generator=generator) for generator in self._generators]
        return torch.cat(draws)
