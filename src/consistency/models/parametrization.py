"""What a network predicts and how it sees the noise level: D = skip x + out F(input x, noise).

A parametrization is a frozen dataclass, `(sigma [B]) -> Coefficients`, with a `boundary`: the level at and below which
the model is the identity. More of them: `@register_parametrization` on a class of one's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from consistency.models.register import register_parametrization
from consistency.noise.grids import descending_with_zero


class Coefficients(NamedTuple):
    """c_skip, c_out, c_in and c_noise (EDM, Eq. 7), each with the shape of sigma."""

    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


class Parametrization(Protocol):
    """What a denoiser asks of a parametrization."""

    @property
    def boundary(self) -> float:
        """Level at and below which the model is the identity: 0, or `sigma_min` of a consistency function."""

    def __call__(self, sigma: Tensor) -> Coefficients:
        """Coefficients at levels above the boundary, in float32 where sigma is."""


def sampling_levels(
    parametrization: Parametrization, num_steps: int, *, sigma_min: float, sigma_max: float, rho: float
) -> Tensor:
    """Levels of an ODE sampler: the parametrization's own `sampling_levels`, or the Karras grid; ends in 0."""
    own = getattr(parametrization, "sampling_levels", None)
    if own is not None:
        return own(num_steps, sigma_min=sigma_min, sigma_max=sigma_max)
    return descending_with_zero(num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)


@register_parametrization("edm")
@dataclass(frozen=True)
class EDM:
    """The preconditioning of EDM (Table 1), with the boundary of consistency models (CM, App. C; iCT, Eq. 2).

    c_skip = sd^2 / ((sigma - boundary)^2 + sd^2), c_out = (sigma - boundary) sd / sqrt(sigma^2 + sd^2),
    c_in = 1 / sqrt(sigma^2 + sd^2), c_noise = noise_scale ln(sigma); only the first two are shifted.

    Args:
        sigma_data: Standard deviation of the data, in units of [-1, 1].
        boundary: 0 for EDM and ECT, `sigma_min` for CD, CT and iCT.
        noise_scale: 0.25 (EDM, iCT) or 250 (OpenAI's published weights). 250 makes the embedding a thousand times as
            sensitive, which continuous or fine grids do not bear.

    Raises:
        ValueError: if `sigma_data` or `noise_scale` is not positive, or `boundary` negative.
    """

    sigma_data: float = 0.5
    boundary: float = 0.0
    noise_scale: float = 0.25

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {self.sigma_data}; change data.sigma_data")
        _check_common(self.boundary, self.noise_scale)

    def __call__(self, sigma: Tensor) -> Coefficients:
        """Coefficients at sigma [B]; c_skip is exactly 1 and c_out exactly 0 at the boundary."""
        total = torch.sqrt(sigma**2 + self.sigma_data**2)
        shifted = sigma - self.boundary
        # c_skip with sd^2 divided out: `sd**2 / (0 + sd**2)` is 1 - 6e-8 for some sd in float32, 1 / (0 + 1) never.
        skip = 1 / ((shifted / self.sigma_data) ** 2 + 1)
        return Coefficients(skip, shifted * self.sigma_data / total, 1 / total, self.noise_scale * sigma.log())


@register_parametrization("flow")
@dataclass(frozen=True)
class Flow:
    """F is the velocity of flow matching, a straight path from noise to data (Lipman et al. 2023).

    x_t = (1 - t) z + t x is (x + sigma z) / (1 + sigma) with sigma = (1 - t) / t: the network sees x_t, and
    D = x_t + (1 - t) F. A boundary above 0 shifts c_skip and c_out as in `EDM`. c_noise = noise_scale ln(sigma).

    Args:
        boundary: As of `EDM`.
        noise_scale: As of `EDM`.

    Raises:
        ValueError: if `noise_scale` is not positive, or `boundary` negative.
    """

    boundary: float = 0.0
    noise_scale: float = 0.25

    def __post_init__(self) -> None:
        _check_common(self.boundary, self.noise_scale)

    def __call__(self, sigma: Tensor) -> Coefficients:
        """Coefficients at sigma [B]."""
        shifted = sigma - self.boundary
        noise = self.noise_scale * sigma.log()
        return Coefficients(1 / (1 + shifted), shifted / (1 + sigma), 1 / (1 + sigma), noise)


@register_parametrization("trig")
@dataclass(frozen=True)
class TrigFlow:
    """TrigFlow (sCM, Lu & Song 2024): D = cos(t) x_t - sin(t) sd F(x_t / sd, t).

    x_t = cos(t) x and t = arctan(sigma / sd), which is c_noise.

    cos^2(t) is EDM's c_skip and sd sin(t) its c_out: the same model with the sign of F turned, and another clock.

    Args:
        sigma_data: Standard deviation of the data, in units of [-1, 1].
        boundary: As of `EDM`.

    Raises:
        ValueError: if `sigma_data` is not positive.
    """

    sigma_data: float = 0.5
    boundary: float = 0.0

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {self.sigma_data}; change data.sigma_data")

    def __call__(self, sigma: Tensor) -> Coefficients:
        """Coefficients at sigma [B]."""
        total = torch.sqrt(sigma**2 + self.sigma_data**2)
        shifted = sigma - self.boundary
        skip = 1 / ((shifted / self.sigma_data) ** 2 + 1)
        return Coefficients(skip, -shifted * self.sigma_data / total, 1 / total, torch.atan(sigma / self.sigma_data))


def _check_common(boundary: float, noise_scale: float) -> None:
    if not boundary >= 0:
        raise ValueError(f"boundary must be 0 or more, got {boundary}; change parametrization.boundary")
    if not noise_scale > 0:
        raise ValueError(f"noise_scale must be positive, got {noise_scale}; change parametrization.noise_scale")
