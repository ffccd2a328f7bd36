"""Samplers: `sample_*(denoiser, noise, sigmas, *, labels, randn_like) -> images`, all [B, C, H, W].

`noise` is the start, already scaled: N(0, sigmas[0]^2 I). `sigmas` is 1-D and decreasing; samplers of the ODE need a
final 0. `randn_like` makes later noise (deterministic samplers ignore it); `ops.randn_of_seeds` gives each image its
own. The state has the dtype of `noise`; EDM integrates in float64. Nothing is clamped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from consistency.models.denoiser import Denoiser
from consistency.models.parametrization import sampling_levels
from consistency.noise.grids import RHO, SIGMA_MIN
from consistency.sampling.steps import DenoiserFn, euler_step, heun_step, ode_derivative

RandnLike = Callable[[Tensor], Tensor]


@torch.no_grad()
def sample_multistep(
    denoiser: DenoiserFn,
    noise: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    randn_like: RandnLike = torch.randn_like,
    sigma_min: float = SIGMA_MIN,
) -> Tensor:
    """Multistep consistency sampling (CM, Alg. 1): x = f(x, tau), then x + sqrt(tau'^2 - sigma_min^2) z, and again.

    Args:
        denoiser: f.
        noise: [B, C, H, W], N(0, sigmas[0]^2 I).
        sigmas: Decreasing levels above sigma_min, one network evaluation each, e.g. (80, 0.821). No final 0.
        labels: [B] int64 or None.
        randn_like: Source of the noise between two evaluations.
        sigma_min: Boundary level of the model.

    Raises:
        ValueError: if the levels do not decrease (increasing ones give noise, silently).
    """
    levels = sigmas.tolist()
    if not levels or not all(a > b for a, b in pairwise([*levels, sigma_min])):  # refuses NaN too
        raise ValueError(
            f"multistep levels must decrease from sigma_max and stay above sigma_min={sigma_min}, got {levels}; "
            "change sampler.mid_sigmas"
        )
    x = denoiser(noise, _level(levels[0], noise), labels).to(noise.dtype)
    for sigma in levels[1:]:
        x = x + math.sqrt(sigma**2 - sigma_min**2) * randn_like(x)
        x = denoiser(x, _level(sigma, x), labels).to(noise.dtype)
    return x


@torch.no_grad()
def sample_onestep(
    denoiser: DenoiserFn,
    noise: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    randn_like: RandnLike = torch.randn_like,
) -> Tensor:
    """f(noise, sigmas[0]): one network evaluation (CM, Sec. 4)."""
    return sample_multistep(denoiser, noise, sigmas[:1], labels=labels, randn_like=randn_like)


@torch.no_grad()
def sample_euler(
    denoiser: DenoiserFn,
    noise: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    randn_like: RandnLike = torch.randn_like,
) -> Tensor:
    """Euler's method on the probability flow ODE; n evaluations for n + 1 levels (EDM, Alg. 1 without lines 6-8)."""
    del randn_like  # deterministic
    x = noise
    for sigma, sigma_next in _steps(sigmas):
        x = euler_step(denoiser, x, _level(sigma, x), _level(sigma_next, x), labels)
    return x


@torch.no_grad()
def sample_heun(
    denoiser: DenoiserFn,
    noise: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    randn_like: RandnLike = torch.randn_like,
    s_churn: float = 0.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.003,
) -> Tensor:
    """Heun's method with optional churn; 2n - 1 evaluations for n + 1 levels (EDM, Alg. 1 and 2).

    Args:
        denoiser: D.
        noise: [B, C, H, W], N(0, sigmas[0]^2 I).
        sigmas: Decreasing, ends in 0.
        labels: [B] int64 or None.
        randn_like: Source of the churn's noise.
        s_churn: Total amount of noise added back; 0 is the deterministic sampler, EDM uses 40 on ImageNet-64.
        s_tmin: Churn only above this level.
        s_tmax: Churn only below this level.
        s_noise: Inflation of the added noise; slightly above 1 makes up for lost detail.
    """
    if not s_churn >= 0:
        raise ValueError(f"s_churn must be 0 (deterministic) or more, got {s_churn}; change sampler.solver.s_churn")
    x = noise
    for sigma, sigma_next in _steps(sigmas):
        if s_churn > 0:
            # Drawn in every step, used or not: random streams then match those of EDM's and OpenAI's code.
            fresh = randn_like(x)
            gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
            sigma_hat = sigma * (1 + gamma)
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * fresh
            sigma = sigma_hat
        step = heun_step if sigma_next > 0 else euler_step
        x = step(denoiser, x, _level(sigma, x), _level(sigma_next, x), labels)
    return x


@torch.no_grad()
def sample_dpm2(
    denoiser: DenoiserFn,
    noise: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    randn_like: RandnLike = torch.randn_like,
) -> Tensor:
    """Second-order midpoint method; 2n evaluations for n + 1 levels (DPM-Solver-2 in OpenAI's form).

    The midpoint is ((sigma^(1/3) + sigma_next^(1/3)) / 2)^3; the full step takes the slope found there.
    """
    del randn_like  # deterministic
    x = noise
    for sigma, sigma_next in _steps(sigmas):
        level_mid = _level(((sigma ** (1 / 3) + sigma_next ** (1 / 3)) / 2) ** 3, x)
        x_mid = euler_step(denoiser, x, _level(sigma, x), level_mid, labels)
        x = x + (sigma_next - sigma) * ode_derivative(x_mid, denoiser(x_mid, level_mid, labels), level_mid)
    return x


@torch.no_grad()
def sample_ancestral(
    denoiser: DenoiserFn,
    noise: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    randn_like: RandnLike = torch.randn_like,
) -> Tensor:
    """Ancestral sampling: Euler to sigma_down, then noise of sigma_up; n evaluations for n + 1 levels.

    sigma_up^2 = sigma_next^2 (sigma^2 - sigma_next^2) / sigma^2, sigma_down = sigma_next^2 / sigma.
    """
    x = noise
    for sigma, sigma_next in _steps(sigmas):
        sigma_up = sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        x = euler_step(denoiser, x, _level(sigma, x), _level(sigma_next**2 / sigma, x), labels)
        x = x + sigma_up * randn_like(x)
    return x


@dataclass(frozen=True)
class ConsistencySampler:
    """One-step or multistep sampling of a consistency model, from the model's own sigma_max.

    Args:
        mid_sigmas: Decreasing levels after sigma_max, one more evaluation each; empty for one step. Published two-step
            levels: iCT 0.821 (CIFAR-10) and 1.526 (ImageNet-64); CD 0.585 and 1.382.
    """

    kinds: ClassVar[tuple[str, ...]] = ("consistency", "flow_map")

    mid_sigmas: Sequence[float] = ()

    def __post_init__(self) -> None:
        levels = self.mid_sigmas
        if not isinstance(levels, Sequence) or not all(isinstance(level, int | float) for level in levels):
            raise ValueError(f"mid_sigmas must be a list of levels, e.g. sampler.mid_sigmas=[0.821], got {levels}")

    def levels(self, denoiser: Denoiser) -> list[float]:
        """Noise levels at which the model is evaluated."""
        return [denoiser.sigma_max, *self.mid_sigmas]

    def __call__(
        self, denoiser: Denoiser, noise: Tensor, labels: Tensor | None = None, randn_like: RandnLike = torch.randn_like
    ) -> Tensor:
        """Unit noise [B, C, H, W] -> images."""
        sigmas = torch.tensor(self.levels(denoiser), dtype=torch.float64)
        start = noise * denoiser.sigma_max
        return sample_multistep(
            denoiser, start, sigmas, labels=labels, randn_like=randn_like, sigma_min=denoiser.sigma_min
        )


@dataclass(frozen=True)
class OdeSampler:
    """A solver of the probability flow ODE, on the grid of the model's parametrization (Karras's, or its own).

    Args:
        solver: `sample_euler`, `sample_heun`, `sample_dpm2` or `sample_ancestral`, with its options bound.
        num_steps: Levels before the final 0; EDM uses 18 on CIFAR-10, 40 on FFHQ, 256 on ImageNet-64.
        rho: Curvature of the Karras grid.
        grid: `(num_steps, *, sigma_min, sigma_max) -> levels` in place of that grid, as `uniform_time`.
    """

    kinds: ClassVar[tuple[str, ...]] = ("diffusion", "flow_map")

    solver: Callable[..., Tensor]
    num_steps: int = 18
    rho: float = RHO
    grid: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f"sampler.num_steps must be an integer, at least 1, got {self.num_steps}")
        if not self.rho > 0:
            raise ValueError(f"rho must be positive, got {self.rho}; change sampler.rho")

    def __repr__(self) -> str:
        """The same in every process: the functions by their names and options, not their addresses."""
        parts = [described(self.solver), f"num_steps={self.num_steps}", f"rho={self.rho}"]
        return f"OdeSampler({', '.join(parts + ([described(self.grid)] if self.grid else []))})"

    def levels(self, denoiser: Denoiser) -> list[float]:
        """Noise levels of the grid, the final 0 included."""
        grid = self.grid or partial(sampling_levels, denoiser.parametrization, rho=self.rho)
        return grid(self.num_steps, sigma_min=denoiser.sigma_min, sigma_max=denoiser.sigma_max).tolist()

    def __call__(
        self, denoiser: Denoiser, noise: Tensor, labels: Tensor | None = None, randn_like: RandnLike = torch.randn_like
    ) -> Tensor:
        """Unit noise [B, C, H, W] -> images."""
        sigmas = torch.tensor(self.levels(denoiser), dtype=torch.float64)
        return self.solver(denoiser, noise * denoiser.sigma_max, sigmas, labels=labels, randn_like=randn_like)


def described(function: Any) -> str:
    """A sampler or solver in one line, the same in every process: `sample_heun(s_churn=40)`."""
    if is_dataclass(function):
        return repr(function)
    if not isinstance(function, partial):
        return getattr(function, "__name__", type(function).__name__)
    return f"{described(function.func)}({', '.join(f'{key}={value}' for key, value in function.keywords.items())})"


def _level(sigma: float, x: Tensor) -> Tensor:
    """The level for each image of the batch; [B]."""
    return x.new_full((len(x),), sigma)


def _steps(sigmas: Tensor) -> list[tuple[float, float]]:
    """[(sigma, sigma_next), ...] as numbers; refuses levels that no ODE sampler can follow."""
    levels = sigmas.tolist()
    if len(levels) < 2 or not all(a > b for a, b in pairwise(levels)) or levels[-1] != 0:
        raise ValueError(f"levels of an ODE sampler must decrease and end in 0, got {levels}")
    return list(pairwise(levels))
