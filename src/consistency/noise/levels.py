"""Where to train: which noise levels a batch sees.

Levels are quantile functions: `(k, u) -> sigma`, for pairs `-> (sigma_lo, sigma_hi)`, and `gives` says which. k is the
optimizer step, u [B] in [0, 1) is uniform (`methods.random`), the levels are float32 [B] on the device of u. So they
can be stratified, and belong to an image whatever the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from consistency.noise.grids import RHO, SIGMA_MAX, SIGMA_MIN, check_range, iddpm_levels, karras_grid, vp_sigma
from consistency.ops import send


def _lognormal(u: Tensor, mean: float, std: float) -> Tensor:
    """The quantile function of exp(N(mean, std^2)); u = 0 is taken for the smallest u above it."""
    on_cpu = u.cpu() if u.device.type == "mps" else u  # which has no ndtri
    return send(torch.exp(mean + std * torch.special.ndtri(on_cpu.clamp(min=2.0**-54))), u.device)


def check_gives(levels: Any, kind: str, method: str) -> None:
    """Refuse levels that do not fit a method.

    Args:
        levels: Of this module, or one's own with an attribute `gives`.
        kind: `level` or `pair`.
        method: For the message.

    Raises:
        ValueError: with the levels that fit.
    """
    gives = getattr(levels, "gives", kind)
    if gives != kind:
        fitting = {
            "level": "lognormal, uniform_time, vp, ve, iddpm or fixed (one level an image)",
            "pair": "uniform_index, lognormal_index or ratio (pairs)",
        }
        raise ValueError(f"levels is {type(levels).__name__}; allowed with {method}: {fitting[kind]}")


@dataclass(frozen=True)
class LogNormal:
    """ln sigma ~ N(mean, std^2), unclipped (EDM, Table 1: P_mean = -1.2, P_std = 1.2)."""

    gives: ClassVar[str] = "level"

    mean: float = -1.2
    std: float = 1.2

    def __call__(self, k: int, u: Tensor) -> Tensor:
        """sigma [B]."""
        return _lognormal(u, self.mean, self.std).float()


@dataclass(frozen=True)
class UniformTime:
    """t ~ U(0, 1) on the straight path of flow matching, where sigma = (1 - t) / t (Lipman et al. 2023).

    The ends are those of the model's range, t = 1 / (1 + sigma): t = 0 would be sigma = infinity.
    """

    gives: ClassVar[str] = "level"

    sigma_min: float = SIGMA_MIN
    sigma_max: float = SIGMA_MAX

    def __call__(self, k: int, u: Tensor) -> Tensor:
        """sigma [B]."""
        first, last = 1 / (1 + self.sigma_max), 1 / (1 + self.sigma_min)
        time = last + (first - last) * u
        return ((1 - time) / time).float()


@dataclass(frozen=True)
class FixedLevel:
    """One noise level for all images: a plain denoiser, which learns nothing of the others."""

    gives: ClassVar[str] = "level"

    sigma: float = 0.5

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive, got {self.sigma}; change levels.sigma")

    def __call__(self, k: int, u: Tensor) -> Tensor:
        """sigma [B]."""
        return torch.full_like(u, self.sigma, dtype=torch.float32)


@dataclass(frozen=True)
class UniformVPTime:
    """t ~ U(eps_t, 1) on VP's clock, sigma = sigma(t) (EDM, Table 1).

    Args:
        beta_d: As of `models.table1.VP`.
        beta_min: As of `models.table1.VP`.
        eps_t: The smallest time; sigma(0) is 0, where the weight 1 / sigma^2 has no value.
    """

    gives: ClassVar[str] = "level"

    beta_d: float = 19.9
    beta_min: float = 0.1
    eps_t: float = 1e-5

    def __post_init__(self) -> None:
        if not 0 < self.eps_t < 1:
            raise ValueError(f"eps_t must lie between 0 and 1, got {self.eps_t}; change levels.eps_t")

    def quantile(self, u: Tensor) -> Tensor:
        """sigma(1 + u (eps_t - 1)) of u in [0, 1); float64 [B] -> [B]."""
        return vp_sigma(1 + u * (self.eps_t - 1), beta_d=self.beta_d, beta_min=self.beta_min)

    def __call__(self, k: int, u: Tensor) -> Tensor:
        """sigma [B]."""
        return self.quantile(u).float()


@dataclass(frozen=True)
class LogUniform:
    """ln sigma ~ U(ln sigma_min, ln sigma_max): VE's levels (EDM, Table 1)."""

    gives: ClassVar[str] = "level"

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        check_range(self.sigma_min, self.sigma_max)

    def quantile(self, u: Tensor) -> Tensor:
        """sigma_min (sigma_max / sigma_min)^u of u in [0, 1); float64 [B] -> [B]."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u

    def __call__(self, k: int, u: Tensor) -> Tensor:
        """sigma [B]."""
        return self.quantile(u).float()


@dataclass(frozen=True)
class UniformIDDPMIndex:
    """sigma = u_j, j uniform over 0 ... M - 1: every level of iDDPM but u_M = 0 (EDM, Table 1).

    Args:
        C_1: As of `models.table1.IDDPM`.
        C_2: As of `models.table1.IDDPM`.
        M: As of `models.table1.IDDPM`.
    """

    gives: ClassVar[str] = "level"

    C_1: float = 0.001
    C_2: float = 0.008
    M: int = 1000

    def quantile(self, u: Tensor) -> Tensor:
        """u_floor(M u) of u in [0, 1); float64 [B] -> [B]."""
        levels = iddpm_levels(self.M, c_1=self.C_1, c_2=self.C_2).to(u.dtype)
        return send(levels, u.device)[(u * self.M).long()]

    def __call__(self, k: int, u: Tensor) -> Tensor:
        """sigma [B]."""
        return self.quantile(u).float()


def uniform_index(sigmas: Tensor) -> Tensor:
    """p(n) = 1 / (N - 1) for each gap of the increasing grid; float64 [N - 1] (CM, Eq. 7 and Alg. 2, 3)."""
    return torch.full((len(sigmas) - 1,), 1 / (len(sigmas) - 1), dtype=torch.float64)


def lognormal_index(sigmas: Tensor, *, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """p(n) of iCT Eq. 10: the lognormal's mass in each gap of the increasing grid; float64 [N - 1], sums to 1.

    p(i) ~ erf((ln sigma_{i+1} - mean) / (sqrt(2) std)) - erf((ln sigma_i - mean) / (sqrt(2) std)).
    `mean` is negative: public re-implementations that use +1.1 train at the wrong levels.
    """
    cdf = torch.erf((sigmas.double().log() - mean) / (math.sqrt(2) * std))
    mass = cdf.diff()
    return mass / mass.sum()


@dataclass(frozen=True)
class GridPairs:
    """Neighbours on the Karras grid with N(k) points: (sigmas[n], sigmas[n + 1]), n ~ p (CM, Alg. 2, 3; iCT, Eq. 10).

    The grid is made anew for each batch, because N changes over training.

    Args:
        num_levels: N(k), from `noise.curricula`.
        index: Increasing grid [N] -> probabilities [N - 1]: `uniform_index` or `lognormal_index`.
    """

    gives: ClassVar[str] = "pair"

    num_levels: Callable[[int], int]
    index: Callable[[Tensor], Tensor]
    sigma_min: float = SIGMA_MIN
    sigma_max: float = SIGMA_MAX
    rho: float = RHO

    def __post_init__(self) -> None:
        if not self.rho > 0:
            raise ValueError(f"rho must be positive, got {self.rho}; change levels.rho")

    def __call__(self, k: int, u: Tensor) -> tuple[Tensor, Tensor]:
        """(sigma_lo, sigma_hi), each [B]."""
        sigmas = karras_grid(self.num_levels(k), sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)
        edges = self.index(sigmas).cumsum(0)
        edges = (edges / edges[-1])[:-1]  # P(index <= n), without the last, which is 1
        n = torch.searchsorted(send(edges.to(u.dtype), u.device), u, right=True)
        on_device = send(sigmas.float(), u.device)
        return on_device[n], on_device[n + 1]

    def describe(self, step: int) -> dict[str, float]:
        """{"num_levels": N(step)}."""
        return {"num_levels": self.num_levels(step)}


@dataclass(frozen=True)
class RatioPairs:
    """Pairs of ECT (Geng et al. 2024): sigma_hi lognormal, sigma_lo = sigma_hi * r(sigma_hi, stage).

    r = max(0, 1 - q^-(stage + 1) (1 + k sigmoid(-b sigma_hi))), stage = floor(step / steps_per_stage). In stage 0 low
    levels have sigma_lo = 0, where the target is the clean image: the first stage is close to diffusion training.

    Args:
        steps_per_stage: Optimizer steps between two tightenings. ECT: 3.2 million images, i.e. 25,000 at batch 128.
        q: Base of the tightening; 2 by default, 256 for the one-hour recipe.
        k: Strength of the sigmoid; 0 is the paper's constant mapping.
        b: Slope of the sigmoid.
        mean: P_mean of ln sigma_hi.
        std: P_std of ln sigma_hi.
    """

    gives: ClassVar[str] = "pair"

    steps_per_stage: int
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self) -> None:
        if self.steps_per_stage < 1:
            raise ValueError(
                f"steps_per_stage must be at least 1, got {self.steps_per_stage}; change levels.steps_per_stage"
            )
        if self.q <= 1:
            raise ValueError(f"q must be greater than 1, got {self.q}; change levels.q")

    def ratio(self, sigma: Tensor, step: int) -> Tensor:
        """r(sigma, stage) in [0, 1), shape of `sigma`."""
        gap = self.q ** -(step // self.steps_per_stage + 1) * (1 + self.k * torch.sigmoid(-self.b * sigma))
        return torch.clamp(1 - gap, min=0)

    def __call__(self, k: int, u: Tensor) -> tuple[Tensor, Tensor]:
        """(sigma_lo, sigma_hi), each [B]; sigma_lo may be 0."""
        sigma_hi = _lognormal(u, self.mean, self.std).float()
        return sigma_hi * self.ratio(sigma_hi, k), sigma_hi

    def describe(self, step: int) -> dict[str, float]:
        """{"stage": stage of this step}."""
        return {"stage": step // self.steps_per_stage}
