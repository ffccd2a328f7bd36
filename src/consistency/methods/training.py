"""Consistency training: CT (Song et al. 2023), iCT (Song & Dhariwal 2023) and ECT (Geng et al. 2024) are one class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consistency.methods.base import Method, Random, Step
from consistency.models.averages import frozen_copy
from consistency.models.denoiser import Denoiser
from consistency.noise.levels import check_gives
from consistency.ops import add_noise, same_randomness


class ConsistencyTraining(Method):
    """Learn f(x, sigma) from data alone: x_hi and x_lo are one image under one noise at two levels (CM, Alg. 3).

    | | CT | iCT | ECT |
    |---|---|---|---|
    | levels | neighbours on a grid, uniform | neighbours, lognormal | ratio of a lognormal |
    | target_decay | mu(k), adaptive | None: mu = 0 | None |
    | metric | LPIPS or l2 | Pseudo-Huber | Pseudo-Huber, c = 0 |
    | weighting | uniform | 1 / gap | 1 / gap |
    | start | random | random | an EDM model |

    Args:
        denoiser: f_theta, the online network.
        levels: Pairs (sigma_lo, sigma_hi), each [B]; see `noise.levels`.
        metric: d, `(a, b) -> [B]`.
        weighting: lambda, `(sigma_lo, sigma_hi) -> [B]`.
        target_decay: mu(k). None means mu = 0: the target is the online network itself and no copy is kept.
        **options: optimizer and lr_schedule, as of `Method`.

    Raises:
        ValueError: if `levels` gives single levels.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        levels: Any,
        metric: Callable[[Tensor, Tensor], Tensor],
        weighting: Callable[[Tensor, Tensor], Tensor],
        target_decay: Callable[[int], float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(denoiser, **options)
        check_gives(levels, "pair", type(self).__name__)
        lowest = getattr(levels, "sigma_min", None)  # of a grid, which never reaches 0 as ECT's pairs do
        if lowest is not None and lowest != denoiser.boundary:
            raise ValueError(
                f"the levels begin at {lowest}, where the model must be the identity; it is so at {denoiser.boundary}; "
                "set parametrization.boundary=${model.sigma_min}"
            )
        self.target = frozen_copy(denoiser) if target_decay is not None else None
        self.target_decay = target_decay
        self.levels, self.metric, self.weighting = levels, metric, weighting

    @property
    def network_passes(self) -> int:
        """One, of the target."""
        return 1

    def neighbour(self, x: Tensor, z: Tensor, sigma_hi: Tensor, sigma_lo: Tensor, labels: Tensor) -> Tensor:
        """x_lo, the point at sigma_lo of the trajectory through x_hi: the same image under the same noise."""
        return add_noise(x, z, sigma_lo)

    def step(self, images: Tensor, labels: Tensor, k: int, random: Random) -> Step:
        """lambda d(f_theta(x_hi, sigma_hi), stopgrad f_theta-(x_lo, sigma_lo)) (CM, Eq. 7, 10; iCT, Eq. 3, 5).

        The online network sees the larger level, the target the smaller one: swapped, the model would never be trained
        at sigma_max, where it is sampled. Both passes use one dropout mask (iCT, Sec. 3.1).
        """
        sigma_lo, sigma_hi = self.levels(k, random.uniform(images))  # t_n, t_{n+1}; each [B]
        z = random.normal(images)
        with torch.no_grad():
            x_lo = self.neighbour(images, z, sigma_hi, sigma_lo, labels)
        with same_randomness(images.device) as rewind:
            online = self.denoiser(add_noise(images, z, sigma_hi), sigma_hi, labels)
            rewind()
            with torch.no_grad():
                target = (self.target or self.denoiser)(x_lo, sigma_lo, labels)  # x_lo itself at the boundary
        loss = self.weighting(sigma_lo, sigma_hi) * self.metric(online, target)
        return Step(loss, sigma_hi, self.levels.describe(k))
