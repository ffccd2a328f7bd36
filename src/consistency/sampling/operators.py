"""What zero-shot editing knows of an image, and how it is put back into an estimate (CM, App. D and Alg. 4).

Each `keep_*` returns a function [B, C, H, W] -> [B, C, H, W] that changes its argument in the known directions alone.
The paper rotates pixels by an orthogonal Q and replaces coordinate 0; Q's other columns cancel, so that only its first,
the unit vector q, is needed: x + (known - <x, q>) q.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from consistency.ops import append_dims, derive_seed

LUMA = (0.2989, 0.5870, 0.1140)  # of red, green and blue, as in the paper's code


def project_pixels(images: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Inpainting: the pixels where `mask` is 1 are those of `images`, the others are filled.

    Args:
        images: [B, C, H, W].
        mask: 1 = known, 0 = to be filled (OpenAI's convention); [H, W] or [B, 1, H, W].
    """
    known = mask.to(images.device) > 0.5
    return lambda x: torch.where(known, images.to(x.dtype), x)


def project_grey(images: Tensor) -> Callable[[Tensor], Tensor]:
    """Colorization: the luma is that of `images`, [B, 3, H, W] or grey [B, 1, H, W]."""

    def replace(x: Tensor) -> Tensor:
        q = torch.tensor(LUMA, device=x.device, dtype=x.dtype)
        q = (q / q.norm())[None, :, None, None]
        known = (images.to(x.dtype) * q).sum(1, keepdim=True)
        return x + (known - (x * q).sum(1, keepdim=True)) * q

    return replace


def project_means(small: Tensor, factor: int) -> Callable[[Tensor], Tensor]:
    """Super-resolution: the mean of each patch of `factor` x `factor` pixels is that pixel of `small`, [B, C, h, w]."""

    def replace(x: Tensor) -> Tensor:
        return x + enlarge(small.to(x.dtype) - F.avg_pool2d(x, factor), factor)

    return replace


def grey(images: Tensor) -> Tensor:
    """The luma of uint8 images [N, 3, H, W], or grey ones [N, 1, H, W], in three equal channels."""
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    luma = (images.float() * torch.tensor(LUMA)[:, None, None]).sum(1, keepdim=True) / sum(LUMA)
    return luma.round().to(torch.uint8).expand(-1, 3, -1, -1)


def hidden(images: Tensor, known: Tensor) -> Tensor:
    """uint8 images with the pixels that are not known in mid grey, to be looked at."""
    return torch.where(known, images, torch.full_like(images, 128))


def enlarge(images: Tensor, factor: int) -> Tensor:
    """Each pixel becomes a patch of `factor` x `factor`; [B, C, h, w] -> [B, C, h factor, w factor]."""
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def named_mask(
    name: str,
    size: int,
    *,
    box: Sequence[int] | None = None,
    fraction: float = 0.5,
    seed: int = 0,
    num_images: int = 1,
) -> Tensor:
    """A mask that is 1 where the image is known; bool [num_images, 1, size, size].

    Args:
        name: `left`, `right`, `top`, `bottom`: that half is hidden; `box`: a rectangle is; `random`: single pixels are.
        size: Height and width.
        box: Top, left, height, width in pixels; None for the middle half of the image.
        fraction: Of the pixels that `random` hides.
        seed: Of `random`; each image has a mask of its own.
        num_images: Masks.

    Raises:
        ValueError: for another name, or a box outside the image.
    """
    half, known = size // 2, torch.ones(num_images, 1, size, size, dtype=torch.bool)
    halves = {"top": (0, 0, half, size), "bottom": (half, 0, size - half, size)}
    halves |= {"left": (0, 0, size, half), "right": (0, half, size, size - half)}
    if name == "random":
        if not 0 <= fraction <= 1:
            raise ValueError(f"the hidden fraction must be between 0 and 1, got {fraction}; change task.fraction")
        for index in range(num_images):
            generator = torch.Generator().manual_seed(derive_seed("mask", seed, index))
            known[index] = torch.rand(size, size, generator=generator) >= fraction
        return known
    if name not in (*halves, "box"):
        allowed = ", ".join((*halves, "box", "random"))
        raise ValueError(f"mask is {name}; allowed: {allowed}, or an image file in which white is known")
    quarter = size // 4
    top, left, height, width = halves.get(name) or box or (quarter, quarter, size - 2 * quarter, size - 2 * quarter)
    if min(top, left) < 0 or min(height, width) < 1 or top + height > size or left + width > size:
        raise ValueError(
            f"the box {[top, left, height, width]} (top, left, height, width) is not inside {size} x {size} pixels; "
            "change task.box"
        )
    known[:, :, top : top + height, left : left + width] = False
    return known


def slerp(start: Tensor, end: Tensor, places: Tensor) -> Tensor:
    """Spherical interpolation of Gaussian noise; [C, H, W] twice and [N] in [0, 1] -> [N, C, H, W].

    The angle is that between the flattened images (CM, App. D): the length of the noise stays what the model knows.
    """
    cosine = torch.dot(start.flatten(), end.flatten()) / (start.norm() * end.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    places = append_dims(places.to(start), start.ndim + 1)
    if angle.sin().abs() < 1e-6 * math.pi:  # one direction: the straight line
        return (1 - places) * start + places * end
    return (torch.sin((1 - places) * angle) * start + torch.sin(places * angle) * end) / angle.sin()
