"""d(a, b), the papers' metric between two images: `(a, b) -> [B]`, images [B, C, H, W] in [-1, 1].

Values are not clamped: a denoiser may leave [-1, 1], and a clamp would kill its gradient there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean over pixels of |a - b|; [B]."""
    return (a - b).abs().flatten(1).mean(dim=1)


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean over pixels of (a - b)^2, not rooted, as in OpenAI's code; [B]."""
    return (a - b).square().flatten(1).mean(dim=1)


def pseudo_huber(a: Tensor, b: Tensor, *, c: float | None = None) -> Tensor:
    """sqrt(||a - b||^2 + c^2) - c, the norm over the whole sample; [B] (iCT, Eq. 8).

    Public re-implementations apply it to each pixel, which is another loss.

    Args:
        c: Where quadratic turns linear; None for iCT's 0.00054 sqrt(d), d = C * H * W. 0 is the plain norm (ECT).
    """
    if c is None:
        c = 0.00054 * math.sqrt(a[0].numel())
    squared = (a - b).square().flatten(1).sum(dim=1)
    if c == 0:
        # The root of 0 has an infinite slope; equal images must give a zero gradient, not NaN.
        return torch.where(squared > 0, squared.clamp(min=1e-30).sqrt(), torch.zeros_like(squared))
    # Equal to sqrt(squared + c^2) - c, but exactly 0 for equal images, and without the digits that subtraction loses.
    return squared / (torch.sqrt(squared + c**2) + c)
