"""Non-leaky augmentation (Karras et al. 2022, App. F.2): images are deformed at random, and the network is told how.

A network that sees the nine labels of each training image learns the deformed images apart from the others; sampled
with labels of zero, it draws undeformed ones. Set, order and scale of the labels are those of EDM's CIFAR-10 networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from consistency.ops import append_dims

NUM_LABELS = 9
SCALE_STD = 0.2  # of log2 of the enlargement; the same for the anisotropic stretch
SHIFT_STD = 0.125  # as a fraction of the side
TAPS = 16  # of the low-pass filter on the fine grid: 8 pixels


class AugmentParameters(NamedTuple):
    """What happens to each image, in this order; float32, zero for what does not happen.

    Directions are as one sees the picture: x to the right, y down the rows, angles counter-clockwise from the right.
    """

    flip_x: Tensor  # [B], 1 mirrors left and right
    flip_y: Tensor  # [B], 1 mirrors top and bottom
    scale: Tensor  # [B], enlarges by 2^(0.2 scale)
    rotation: Tensor  # [B], turns counter-clockwise, radians
    stretch: Tensor  # [B], stretches by 2^(0.2 stretch) along `direction` and shrinks by as much across
    direction: Tensor  # [B], of the stretch, radians
    shift: Tensor  # [B, 2], moves by (0.125 W shift_0, 0.125 H shift_1) pixels, right and down


@dataclass(frozen=True)
class NonLeakyAugment:
    """Deform a batch at random: (images, labels) = augment(images, generator).

    Half of the images are mirrored, always. Each of vertical flip, scale, rotation, stretch and shift happens with
    `probability`, independently. Images to which only flips happen keep every bit. The others are interpolated and may
    leave [-1, 1] by a little; as in EDM they are not clamped, which would darken or brighten one side of an edge.

    Args:
        probability: In [0, 1]; EDM uses 0.12 on CIFAR-10.
    """

    probability: float = 0.12

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {self.probability}; set data.augment.probability")

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augment float [B, C, H, W] in [-1, 1] -> (images, labels float32 [B, 9]), both on the device of `images`.

        `generator` is a CPU generator, so that every device draws the same. Height and width are at least 5.
        """
        parameters = draw_parameters(len(images), self.probability, generator)
        return apply_parameters(images, parameters), augment_labels(parameters).to(images.device)


def draw_parameters(batch_size: int, probability: float, generator: torch.Generator) -> AugmentParameters:
    """Parameters of `batch_size` images, on the CPU.

    Before the coins that keep them with `probability`: flips are 0 or 1 evenly, scale, stretch and shift standard
    normal, angles uniform in [-pi, pi). `flip_x` is always kept; `direction` is kept with probability 1/2.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, generator=generator)

    def coin(chance: float) -> Tensor:
        return (torch.rand(batch_size, generator=generator) < chance).float()

    def angle() -> Tensor:
        return (2 * torch.rand(batch_size, generator=generator) - 1) * math.pi

    return AugmentParameters(
        flip_x=coin(0.5),
        flip_y=coin(0.5) * coin(probability),
        scale=normal() * coin(probability),
        rotation=angle() * coin(probability),
        stretch=normal() * coin(probability),
        direction=angle() * coin(0.5),
        shift=normal(2) * append_dims(coin(probability), 2),
    )


def augment_labels(parameters: AugmentParameters) -> Tensor:
    """Labels [B, 9]: flip_x, flip_y, scale, cos(rotation) - 1, sin(rotation), stretch (cos, sin)(direction), shift.

    All zero for an image to which nothing happened. The order is that of the inputs of EDM's `map_augment`.
    """
    flip_x, flip_y, scale, rotation, stretch, direction, shift = parameters
    stretches = stretch * direction.cos(), stretch * direction.sin()
    labels = [flip_x, flip_y, scale, rotation.cos() - 1, rotation.sin(), *stretches, *shift.unbind(1)]
    return torch.stack(labels, dim=1)


def apply_parameters(images: Tensor, parameters: AugmentParameters) -> Tensor:
    """Flip the images [B, C, H, W], then warp those that anything else happens to. Parameters are on the CPU."""
    flip_x, flip_y = (append_dims(flip.to(images.device) == 1, 4) for flip in parameters[:2])
    images = torch.where(flip_x, images.flip(3), images)
    images = torch.where(flip_y, images.flip(2), images)
    warped = augment_labels(parameters)[:, 2:].any(dim=1).nonzero()[:, 0]  # found on the CPU: no wait for a GPU
    if len(warped) == 0:
        return images
    inverse = inverse_affine(parameters, *images.shape[2:])[warped]
    warped = warped.to(images.device)
    images[warped] = warp(images[warped], inverse.to(images.device))
    return images


def inverse_affine(parameters: AugmentParameters, height: int, width: int) -> Tensor:
    """Matrices [B, 2, 3] from a pixel's place (x, y, 1) after scale, rotation, stretch and shift to its place before.

    Places are in pixels from the image's centre, x to the right and y down. With R(a) = [[cos a, -sin a], [sin a,
    cos a]], which turns clockwise on a screen because y points down, the linear part is
    2^(-0.2 scale) R(rotation) R(-direction) diag(1/s, s) R(direction), s = 2^(0.2 stretch).
    """
    s = torch.exp2(SCALE_STD * parameters.stretch)
    squeeze = torch.diag_embed(torch.stack([1 / s, s], dim=1))
    along = _rotation(parameters.direction)
    linear = _rotation(parameters.rotation) @ along.transpose(1, 2) @ squeeze @ along
    linear = linear * append_dims(torch.exp2(-SCALE_STD * parameters.scale), 3)
    shift = SHIFT_STD * parameters.shift * torch.tensor([width, height])
    return torch.cat([linear, -linear @ shift[:, :, None]], dim=2)


def warp(images: Tensor, inverse: Tensor) -> Tensor:
    """Images [B, C, H, W] under affine maps given by their inverses [B, 2, 3], see `inverse_affine`.

    As in EDM: upsampled by 2, sampled bilinearly on a grid twice as fine, low-passed and downsampled. Outside, the
    image continues as its reflection about the centres of the border pixels, as often as needed (EDM: once, then 0).
    """
    height, width = images.shape[2:]
    margin = TAPS // 2 - 1  # what the downsampling filter needs around the image
    x, y = (torch.arange(-margin, 2 * side + margin, device=images.device) for side in (width, height))
    x, y = x / 2 - width / 2 + 0.25, y / 2 - height / 2 + 0.25  # fine sample j lies at pixel (j - 0.5) / 2
    a, b, c = inverse[..., None, None].unbind(2)
    source = a * x + b * y[:, None] + c  # [B, 2, 2H + 14, 2W + 14]; no matmul: TF32 would blur the places
    sides = torch.tensor([width, height], device=images.device).view(2, 1, 1)
    half = (sides - 1) / 2
    source = half - (torch.remainder(source + half, 4 * half) - 2 * half).abs()  # reflected into [-half, half]
    grid = (2 * source / sides).permute(0, 2, 3, 1).to(images.dtype)
    return _downsample(F.grid_sample(_upsample(images), grid, mode="bilinear", align_corners=False))


def lowpass() -> Tensor:
    """Taps [16] of a root-raised-cosine filter with roll-off 1/2, in units of half a pixel; their sum is 1.

    h(t) = (sin(pi t / 2) + 2 t cos(3 pi t / 2)) / (pi t (1 - 4 t^2)), t in pixels. It is symmetric, and orthogonal to
    itself moved by whole pixels: upsampling and downsampling with it returns the image, to 0.8 % with 16 taps.
    EDM's filter, the wavelet sym6, does so exactly but is not symmetric.
    """
    t = (torch.arange(TAPS, dtype=torch.float64) - (TAPS - 1) / 2) / 2
    pi_t = math.pi * t
    taps = ((pi_t / 2).sin() + 2 * t * (1.5 * pi_t).cos()) / (pi_t * (1 - 4 * t**2))
    return taps / taps.sum()


def _upsample(images: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, 2H, 2W]; fine samples lie a quarter of a pixel beside the pixels' centres."""
    taps = 2 * lowpass().to(images)
    fine = F.pad(images, [TAPS // 4] * 4, mode="reflect").flatten(0, 1)[:, None]  # [B C, 1, H + 8, W + 8]
    fine = F.conv_transpose2d(fine, taps.view(1, 1, -1, 1), stride=(2, 1), padding=(TAPS - 1, 0))
    fine = F.conv_transpose2d(fine, taps.view(1, 1, 1, -1), stride=(1, 2), padding=(0, TAPS - 1))
    return fine.view(*images.shape[:2], *fine.shape[2:])


def _downsample(fine: Tensor) -> Tensor:
    """[B, C, 2H + 14, 2W + 14] -> [B, C, H, W], the transpose of `_upsample` but for its gain of 4."""
    taps = lowpass().to(fine)
    images = F.conv2d(fine.flatten(0, 1)[:, None], taps.view(1, 1, -1, 1), stride=(2, 1))
    images = F.conv2d(images, taps.view(1, 1, 1, -1), stride=(1, 2))
    return images.view(*fine.shape[:2], *images.shape[2:])


def _rotation(angle: Tensor) -> Tensor:
    """[[cos, -sin], [sin, cos]] of angles [B]: [B, 2, 2]."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
