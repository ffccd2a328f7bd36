"""The Karras noise grid. The papers count t_1 < ... < t_N; OpenAI's code stores the same grid descending."""

from __future__ import annotations

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
            "change noise.sigma_min or noise.sigma_max"
        )
