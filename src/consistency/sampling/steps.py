"""Steps of the probability flow ODE dx/dsigma = (x - D(x; sigma)) / sigma (EDM, Eq. 1 with sigma(t) = t).

Levels are [B], as the networks take them; `sigma_next` may be 0 in an Euler step.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from consistency.ops import append_dims

# (x [B, C, H, W], sigma [B], labels [B] or None) -> clean estimate [B, C, H, W]. A `Denoiser` is one.
DenoiserFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def ode_derivative(x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """(x - D(x; sigma)) / sigma; [B, C, H, W]."""
    return (x - denoised) / append_dims(sigma, x.ndim)


def euler_step(
    denoiser: DenoiserFn, x: Tensor, sigma: Tensor, sigma_next: Tensor, labels: Tensor | None = None
) -> Tensor:
    """x at sigma_next by one Euler step; one evaluation (EDM, Alg. 1 lines 3-5)."""
    derivative = ode_derivative(x, denoiser(x, sigma, labels), sigma)
    return x + append_dims(sigma_next - sigma, x.ndim) * derivative


def heun_step(
    denoiser: DenoiserFn, x: Tensor, sigma: Tensor, sigma_next: Tensor, labels: Tensor | None = None
) -> Tensor:
    """x at sigma_next > 0 by one Heun step; two evaluations, at sigma and at sigma_next (EDM, Alg. 1 lines 3-8)."""
    gap = append_dims(sigma_next - sigma, x.ndim)
    derivative = ode_derivative(x, denoiser(x, sigma, labels), sigma)
    x_euler = x + gap * derivative
    derivative_next = ode_derivative(x_euler, denoiser(x_euler, sigma_next, labels), sigma_next)
    return x + gap * (derivative + derivative_next) / 2
