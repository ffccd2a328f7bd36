"""Curricula: the number of grid points N(k) and the decay mu(k) of the target network.

Each is a frozen dataclass that maps the optimizer step k = 0, 1, ... to a number. N(k) counts grid *points*,
the papers' "+ 1" included. Past `total_steps` every curriculum stays at its last value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class FixedLevels:
    """N(k) = num_levels. CD uses 18 on CIFAR-10 and 40 on ImageNet-64 (CM, Table 3)."""

    num_levels: int

    def __post_init__(self) -> None:
        if self.num_levels < 2:
            raise ValueError(
                f"num_levels must be at least 2 (one gap), got {self.num_levels}; "
                "change curriculum.num_levels.num_levels"
            )

    def __call__(self, step: int) -> int:
        """N(step)."""
        return self.num_levels


@dataclass(frozen=True)
class _Growing:
    """Number of gaps grows from `start` (s0) to `end` (s1) over `total_steps` (K) optimizer steps."""

    start: int
    end: int
    total_steps: int

    def __post_init__(self) -> None:
        if not 1 <= self.start <= self.end:
            raise ValueError(
                f"a curriculum needs 1 <= start <= end, got start={self.start}, end={self.end}; "
                "change curriculum.start or curriculum.end"
            )
        if self.total_steps < 1:
            raise ValueError(f"a curriculum needs total_steps >= 1, got {self.total_steps}; set trainer.max_steps")

    def progress(self, step: int) -> float:
        """k / K in [0, 1]."""
        return min(step / self.total_steps, 1.0)

    def _between(self, share: float) -> int:
        """floor(s0 + (s1 - s0) share) + 1; exact values must not fall one short by rounding."""
        return math.floor(self.start + (self.end - self.start) * share + 1e-9) + 1


@dataclass(frozen=True)
class SqrtLevels(_Growing):
    """N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 (CM, Sec. 5 and App. C.2; iCT, Table 1).

    The inner value is floored at 1 as in OpenAI's code. CT uses s0 = 2 and s1 = 150 (CIFAR-10) or 200 (ImageNet-64).
    """

    def __call__(self, step: int) -> int:
        """N(step)."""
        root = math.sqrt(self.progress(step) * ((self.end + 1) ** 2 - self.start**2) + self.start**2)
        return max(math.ceil(root - 1), 1) + 1


@dataclass(frozen=True)
class DoublingLevels(_Growing):
    """N(k) = min(s0 2^floor(k/K'), s1) + 1, K' = floor(K / (log2 floor(s1/s0) + 1)) (iCT, Eq. 9).

    iCT uses s0 = 10, s1 = 1280. K' is at least 1, so that short test runs work.
    """

    @property
    def steps_per_stage(self) -> int:
        """K', the optimizer steps between two doublings."""
        return max(math.floor(self.total_steps / (math.log2(self.end // self.start) + 1)), 1)

    def __call__(self, step: int) -> int:
        """N(step)."""
        # The exponent is bounded: a run far past the end must not build a huge integer.
        doublings = min(step // self.steps_per_stage, 64)
        return min(self.start * 2**doublings, self.end) + 1


@dataclass(frozen=True)
class LinearLevels(_Growing):
    """N(k) = floor(s0 + (s1 - s0) k/K) + 1, the linear shape of iCT Fig. 3b (the paper draws it, without a formula)."""

    def __call__(self, step: int) -> int:
        """N(step)."""
        return self._between(self.progress(step))


@dataclass(frozen=True)
class SquareLevels(_Growing):
    """N(k) = floor(s0 + (s1 - s0) (k/K)^2) + 1, the square shape of iCT Fig. 3b."""

    def __call__(self, step: int) -> int:
        """N(step)."""
        return self._between(self.progress(step) ** 2)


@dataclass(frozen=True)
class CosineLevels(_Growing):
    """N(k) = floor(s0 + (s1 - s0) (1 - cos(pi k/K)) / 2) + 1, the cosine shape of iCT Fig. 3b."""

    def __call__(self, step: int) -> int:
        """N(step)."""
        return self._between((1 - math.cos(math.pi * self.progress(step))) / 2)


@dataclass(frozen=True)
class FixedDecay:
    """mu(k) = decay. CD on ImageNet-64 and LSUN uses 0.95, on CIFAR-10 0 (CM, Table 3)."""

    decay: float

    def __post_init__(self) -> None:
        _check_decay(self.decay)

    def __call__(self, step: int) -> float:
        """mu(step)."""
        return self.decay


@dataclass(frozen=True)
class AdaptiveDecay:
    """mu(k) = exp(s0 ln(mu0) / (N(k) - 1)) (CM, Sec. 5 and App. C.2).

    The paper divides by N(k), OpenAI's code by the number of gaps N(k) - 1. Code is the default, because the
    published weights were made with it; `per_gap=False` is the paper's formula.

    Args:
        num_levels: N(k), the same curriculum that draws the pairs.
        start: s0.
        decay: mu0; 0.9 on CIFAR-10, 0.95 on ImageNet-64.
        per_gap: Divide by N(k) - 1 (code) or by N(k) (paper).
    """

    num_levels: Callable[[int], int]
    start: int
    decay: float
    per_gap: bool = True

    def __post_init__(self) -> None:
        _check_decay(self.decay)
        if self.decay == 0:
            raise ValueError(
                "adaptive target_decay needs mu0 in (0, 1), got 0; use curriculum.target_decay=null for mu = 0"
            )

    def __call__(self, step: int) -> float:
        """mu(step)."""
        denominator = self.num_levels(step) - (1 if self.per_gap else 0)
        return math.exp(self.start * math.log(self.decay) / denominator)


def _check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"target decay must be in [0, 1), got {decay}; change curriculum.target_decay.decay")
