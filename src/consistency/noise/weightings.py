"""Weights lambda per sample: `(sigma_lo, sigma_hi) -> [B]`.

All but `inverse_gap` look at one level. For a pair that is `sigma_hi`, as in OpenAI's and JAX code (the papers write
lambda(t_n), the lower one). The denoising loss of EDM has one level and passes it as both.
"""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(sigma_lo: Tensor, sigma_hi: Tensor) -> Tensor:
    """1 (CM, Table 3: every CD and CT run)."""
    return torch.ones_like(sigma_hi)


def edm(sigma_lo: Tensor, sigma_hi: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = sigma^-2 + sigma_data^-2 (EDM, Table 1)."""
    return sigma_hi**-2 + sigma_data**-2


def snr(sigma_lo: Tensor, sigma_hi: Tensor) -> Tensor:
    """sigma^-2."""
    return sigma_hi**-2


def snr_plus_one(sigma_lo: Tensor, sigma_hi: Tensor) -> Tensor:
    """sigma^-2 + 1."""
    return sigma_hi**-2 + 1


def truncated_snr(sigma_lo: Tensor, sigma_hi: Tensor) -> Tensor:
    """max(sigma^-2, 1) (Salimans & Ho 2022)."""
    return torch.clamp(sigma_hi**-2, min=1)


def velocity(sigma_lo: Tensor, sigma_hi: Tensor) -> Tensor:
    """((1 + sigma) / sigma)^2: the error of D becomes that of the velocity of flow matching, whose weight is 1.

    D - x = (1 - t) (v - (x - z)) with 1 - t = sigma / (1 + sigma), see `models.parametrization.Flow`.
    """
    return ((1 + sigma_hi) / sigma_hi) ** 2


def inverse_gap(sigma_lo: Tensor, sigma_hi: Tensor) -> Tensor:
    """1 / (sigma_hi - sigma_lo) (iCT, Sec. 3.1 and Table 1; ECT uses the same on its own pairs).

    It needs pairs: the single level of EDM has no gap.
    """
    return 1 / (sigma_hi - sigma_lo)


inverse_gap.needs_pairs = True  # type: ignore[attr-defined]  # EDM refuses it
