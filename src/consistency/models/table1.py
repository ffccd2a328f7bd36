"""The other rows of EDM's Table 1: VP and VE (Song et al. 2021), and iDDPM with DDIM (Nichol & Dhariwal 2021).

All are D = x + c_out F(c_in x, c_noise): F is the noise, up to its sign. A boundary above 0, of consistency models,
shifts c_out as in `parametrization.EDM`. Each has its own sampling levels; solvers are the same for all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from consistency.models.parametrization import Coefficients
from consistency.models.register import register_parametrization
from consistency.noise.grids import check_range, iddpm_levels, vp_sigma, vp_time

EPS_T = 1e-5  # VP's smallest time in training
EPS_S = 1e-3  # and in sampling
J_0 = 8  # iDDPM's first index in sampling
MAX_LEVELS = 100_000  # M of iDDPM


@register_parametrization("vp")
@dataclass(frozen=True)
class VP:
    """The variance-preserving SDE: sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), t in [0, 1].

    c_skip = 1, c_out = -sigma, c_in = 1 / sqrt(sigma^2 + 1), c_noise = (M - 1) t(sigma).

    Args:
        beta_d: Growth of the noise rate over time.
        beta_min: Noise rate at t = 0.
        M: Steps that the network counts its time in.
        boundary: 0, or `sigma_min` of a consistency model.

    Raises:
        ValueError: if an argument is not positive.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    M: int = 1000
    boundary: float = 0.0

    def __post_init__(self) -> None:
        _check_positive(beta_d=self.beta_d, beta_min=self.beta_min, M=self.M)

    def __call__(self, sigma: Tensor) -> Coefficients:
        """Coefficients at sigma [B]."""
        return Coefficients(
            torch.ones_like(sigma), self.boundary - sigma, _unit_input(sigma), (self.M - 1) * self._time(sigma)
        )

    def own_range(self) -> tuple[float, float]:
        """(sigma_min, sigma_max) of EDM's code: sigma(1e-5), sigma(1)."""
        low, high = self._sigma(torch.tensor([EPS_T, 1.0], dtype=torch.float64)).tolist()
        return low, high

    def sampling_levels(self, num_steps: int, *, sigma_min: float, sigma_max: float) -> Tensor:
        """Equal steps of t from t(sigma_max), then 0; decreasing, float64 [num_steps + 1].

        They end at eps_s = 1e-3, as Table 1 has it, and not at the 1e-5 of training: sampling does not profit from what
        lies between. Of a model whose range begins above eps_s, or ends below it, they end at t(sigma_min).
        """
        check_range(sigma_min, sigma_max)
        low, high = self._time(torch.tensor([sigma_min, sigma_max], dtype=torch.float64)).tolist()
        times = torch.linspace(high, EPS_S if low < EPS_S < high else low, num_steps, dtype=torch.float64)
        return _ending_in_zero(self._sigma(times), sigma_max)

    def _sigma(self, time: Tensor) -> Tensor:
        return vp_sigma(time, beta_d=self.beta_d, beta_min=self.beta_min)

    def _time(self, sigma: Tensor) -> Tensor:
        return vp_time(sigma, beta_d=self.beta_d, beta_min=self.beta_min)


@register_parametrization("ve")
@dataclass(frozen=True)
class VE:
    """The variance-exploding SDE: c_skip = 1, c_out = sigma, c_in = 1, c_noise = ln(sigma / 2)."""

    boundary: float = 0.0

    def __call__(self, sigma: Tensor) -> Coefficients:
        """Coefficients at sigma [B]."""
        one = torch.ones_like(sigma)
        return Coefficients(one, sigma - self.boundary, one, torch.log(0.5 * sigma))

    def own_range(self) -> tuple[float, float]:
        """(sigma_min, sigma_max) of EDM's code."""
        return 0.02, 100.0

    def sampling_levels(self, num_steps: int, *, sigma_min: float, sigma_max: float) -> Tensor:
        """sigma_max (sigma_min / sigma_max)^(i / (n - 1)), then 0; decreasing, float64 [num_steps + 1]."""
        check_range(sigma_min, sigma_max)
        ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
        return _ending_in_zero(sigma_max * (sigma_min / sigma_max) ** ramp, sigma_max)


@register_parametrization("iddpm")
@dataclass(frozen=True)
class IDDPM:
    """iDDPM's network, trained on the levels u_0 > ... > u_M = 0 of its cosine schedule and told an index.

    c_skip = 1, c_out = -sigma, c_in = 1 / sqrt(sigma^2 + 1), c_noise = M - 1 - j with u_j the level nearest to sigma.
    Only c_noise is rounded: every other coefficient takes sigma as it is.

    Published networks have twice as many outputs as images have channels; `Denoiser` ignores the second half, the
    variances.

    Args:
        C_1: Smallest ratio of alpha_bar from one index to the next; it keeps u_0 finite.
        C_2: Offset of the cosine schedule.
        M: Number of levels above 0.

    Raises:
        ValueError: if an argument is out of range.
    """

    C_1: float = 0.001
    C_2: float = 0.008
    M: int = 1000
    boundary: float = 0.0

    def __post_init__(self) -> None:
        _check_positive(C_1=self.C_1, C_2=self.C_2)
        if not self.C_1 < 1:
            raise ValueError(f"C_1 must be below 1, got {self.C_1}; change parametrization.C_1")
        if not isinstance(self.M, int) or not 2 <= self.M <= MAX_LEVELS:
            raise ValueError(f"M must be an integer from 2 to {MAX_LEVELS:,}, got {self.M}; change parametrization.M")

    def __call__(self, sigma: Tensor) -> Coefficients:
        """Coefficients at sigma [B]; below u_{M-1} / 2 the nearest level is u_M = 0, and c_noise is -1."""
        # M - j is the number of midpoints at or below sigma: one that lies on a midpoint belongs to the higher level.
        middles = _middles(self.C_1, self.C_2, self.M, sigma.dtype, sigma.device)
        noise = torch.bucketize(sigma, middles, right=True).to(sigma.dtype) - 1
        return Coefficients(torch.ones_like(sigma), self.boundary - sigma, _unit_input(sigma), noise)

    def levels(self) -> Tensor:
        """u_0 ... u_M; decreasing, float64 [M + 1]."""
        return iddpm_levels(self.M, c_1=self.C_1, c_2=self.C_2)

    def own_range(self) -> tuple[float, float]:
        """(sigma_min, sigma_max): u_{M-1}, and u_8 where EDM starts sampling; EDM's code itself reaches u_0 = 20291.

        From u_0 the first of 18 steps goes to 10.9, and D = x - sigma F is as wrong as F times 20291.
        """
        levels = self.levels()
        return float(levels[-2]), float(levels[min(J_0, self.M - 2)])

    def sampling_levels(self, num_steps: int, *, sigma_min: float, sigma_max: float) -> Tensor:
        """u_j at equal steps of j from the index of sigma_max to that of sigma_min, then 0; float64 [num_steps + 1].

        j = floor(j_0 + (M - 1 - j_0) / (n - 1) i + 1/2). The first level is sigma_max itself, not u_{j_0}.

        Raises:
            ValueError: if the range has fewer levels than that.
        """
        check_range(sigma_min, sigma_max)
        levels = self.levels()
        ends = self(torch.tensor([sigma_max, sigma_min], dtype=torch.float64)).noise
        first, last = (self.M - 1 - ends).clamp(max=self.M - 1).long().tolist()
        if not num_steps - 1 <= last - first:
            raise ValueError(
                f"iDDPM has {last - first + 1} levels from {sigma_max:g} to {sigma_min:g}, got num_steps={num_steps}; "
                "change sampler.num_steps, or take another sampler.grid"
            )
        step = (last - first) / max(num_steps - 1, 1)
        index = torch.floor(first + step * torch.arange(num_steps, dtype=torch.float64) + 0.5).long()
        return _ending_in_zero(levels[index], sigma_max)


@lru_cache(maxsize=32)
def _middles(c_1: float, c_2: float, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Midpoints of iDDPM's neighbouring levels, increasing [M].

    They are taken in float64 and rounded once, so that a level of float32 never falls on the wrong side of one. On
    their device already: copied in each step, they would make the device wait.
    """
    levels = iddpm_levels(count, c_1=c_1, c_2=c_2)
    return ((levels[:-1] + levels[1:]) / 2).flip(0).to(dtype).to(device)


def _unit_input(sigma: Tensor) -> Tensor:
    return 1 / torch.sqrt(sigma**2 + 1)


def _ending_in_zero(sigmas: Tensor, sigma_max: float) -> Tensor:
    """[n] -> [n + 1], with the first level exactly where the noise starts."""
    sigmas[0] = sigma_max
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _check_positive(**arguments: float) -> None:
    for name, value in arguments.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}; change parametrization.{name}")
