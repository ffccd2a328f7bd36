"""The network predicts the image itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consistency.models.parametrization import Coefficients
from consistency.models.register import register_parametrization


@register_parametrization("predict_x")
@dataclass(frozen=True)
class PredictX:
    """D = F(x / sqrt(sigma^2 + sigma_data^2); ln(sigma) / 4).

    Args:
        sigma_data: Standard deviation of the data.
        boundary: 0 for a diffusion model.
    """

    sigma_data: float = 0.5
    boundary: float = 0.0

    def __call__(self, sigma: Tensor) -> Coefficients:
        """Coefficients at sigma [B]."""
        scale = (sigma**2 + self.sigma_data**2).rsqrt()
        return Coefficients(torch.zeros_like(sigma), torch.ones_like(sigma), scale, sigma.log() / 4)
