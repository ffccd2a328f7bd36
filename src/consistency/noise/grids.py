"""The Karras noise grid, and the levels of VP and iDDPM.

The papers count t_1 < ... < t_N; OpenAI's code stores the same grid descending.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIGMA_MIN = 0.002
SIGMA_MAX = 80.0
RHO = 7.0


def karras_grid(
    num_levels: int, *, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Tensor:
    """The training grid, increasing: `sigmas[0] == sigma_min`, `sigmas[-1] == sigma_max`; float64 [num_levels].

    sigma_i = (sigma_min^(1/rho) + (i - 1)/(N - 1) (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho, i = 1..N
    (EDM, Eq. 5; iCT, Sec. 2).

    Raises:
        ValueError: for fewer than 2 levels (one gap), or levels out of order.
    """
    if num_levels < 2:
        raise ValueError(f"num_levels must be at least 2 (one gap), got {num_levels}; change curriculum.num_levels")
    check_range(sigma_min, sigma_max)
    ramp = torch.linspace(0, 1, num_levels, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (low + ramp * (high - low)) ** rho
    # Exact ends: the boundary condition f(x, sigma_min) = x is tested bit for bit.
    sigmas[0], sigmas[-1] = sigma_min, sigma_max
    return sigmas


def descending_with_zero(
    num_steps: int, *, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Tensor:
    """Levels of an ODE sampler: sigma_max ... sigma_min, then 0; float64 [num_steps + 1] (EDM, Eq. 5)."""
    if num_steps == 1:
        return torch.tensor([sigma_max, 0.0], dtype=torch.float64)
    sigmas = karras_grid(num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    return torch.cat([sigmas.flip(0), sigmas.new_zeros(1)])


def uniform_time(num_steps: int, *, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX) -> Tensor:
    """Levels of an ODE sampler in equal steps of the time of flow matching; decreasing, float64 [num_steps + 1].

    t from 1 / (1 + sigma_max) to 1, sigma = (1 - t) / t. Euler's steps on these levels are those of
    x_t' = x_t + (t' - t) v: the step is linear in x and D, so it does not depend on the scale of x.
    """
    check_range(sigma_min, sigma_max)
    time = torch.linspace(1 / (1 + sigma_max), 1, num_steps + 1, dtype=torch.float64)
    sigmas = (1 - time) / time
    sigmas[0], sigmas[-1] = sigma_max, 0.0
    return sigmas


def descending(num_steps: int, *, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX) -> Tensor:
    """Levels of a consistency model: sigma_max and the next of the Karras grid; decreasing, float64 [num_steps].

    sigma_min is left out: there the model is the identity, and an evaluation would be wasted.
    """
    return karras_grid(num_steps + 1, sigma_min=sigma_min, sigma_max=sigma_max).flip(0)[:-1]


def check_range(sigma_min: float, sigma_max: float) -> None:
    """Raise ValueError unless 0 < sigma_min < sigma_max."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"noise levels must satisfy 0 < sigma_min < sigma_max, got sigma_min={sigma_min}, sigma_max={sigma_max}; "
            "change model.sigma_min or model.sigma_max"
        )


def vp_sigma(time: Tensor, *, beta_d: float, beta_min: float) -> Tensor:
    """sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), the noise level of VP's time (EDM, Table 1)."""
    return torch.expm1(0.5 * beta_d * time**2 + beta_min * time).sqrt()


def vp_time(sigma: Tensor, *, beta_d: float, beta_min: float) -> Tensor:
    """t(sigma) = (sqrt(beta_min^2 + 2 beta_d ln(1 + sigma^2)) - beta_min) / beta_d, the inverse of `vp_sigma`."""
    log = torch.log1p(sigma**2)
    # The same with the difference of two close numbers multiplied out, which float32 needs at low levels.
    return 2 * log / (beta_min + torch.sqrt(beta_min**2 + 2 * beta_d * log))


def iddpm_levels(count: int, *, c_1: float, c_2: float) -> Tensor:
    """The levels u_0 > ... > u_M = 0 of iDDPM, M = `count`; float64 [M + 1] (EDM, Table 1).

    u_{j-1}^2 = (u_j^2 + 1) / max(a(j - 1) / a(j), C_1) - 1 with a(j) = sin^2(pi j / (2 M (C_2 + 1))).
    """
    index = torch.arange(count + 1, dtype=torch.float64, device="cpu")
    alpha_bar = torch.sin(0.5 * math.pi * index / (count * (c_2 + 1))) ** 2
    ratio = (alpha_bar[:-1] / alpha_bar[1:]).clamp(min=c_1)
    grown = (1 / ratio).flip(0).cumprod(0).flip(0)  # u_j^2 + 1 of j = 0 ... M - 1
    return torch.cat([(grown - 1).sqrt(), grown.new_zeros(1)])
