"""Floating-point operations of a network, counted on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from consistency.models.denoiser import Denoiser


def flops_of_image(config: dict[str, Any], extra_passes: int = 0) -> int:
    """Operations of training on one image: forward, backward and further forward passes; a product and a sum are two.

    Counted by PyTorch's counter, which knows convolutions, matrix products and attention; the rest is left out.

    Args:
        config: Of a denoiser.
        extra_passes: Forward passes without gradient beside the student's: of the target and of the teacher.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        denoiser = Denoiser.from_config(config)
        x, sigma = torch.zeros(1, *denoiser.image_shape), torch.ones(1)
        labels = torch.zeros(1, dtype=torch.int64)

    def count(work: Callable[[], Any]) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    with torch.no_grad():
        forward = count(lambda: denoiser(x, sigma, labels))
    both = count(lambda: denoiser(x, sigma, labels).sum().backward())
    return both + extra_passes * forward
