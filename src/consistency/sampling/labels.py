"""Which label fits an image, by the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from consistency.models.denoiser import Denoiser
from consistency.ops import add_noise

MOST_CLASSES = 100


@torch.no_grad()
def guess_labels(
    denoiser: Denoiser,
    images: Tensor,
    replace: Callable[[Tensor], Tensor],
    randn_like: Callable[[Tensor], Tensor],
    sigmas: Sequence[float] = (0.5, 1.0, 2.0),
) -> Tensor:
    """The label under which the known part of each image is estimated best; int64 [B].

    The diffusion classifier (Li et al. 2023): argmin over labels of |D(x + sigma z; sigma, label) - x|^2 over a few
    levels, where x is known. One evaluation for each label and level.

    Args:
        denoiser: A class-conditional model.
        images: [B, C, H, W] in [-1, 1]; what is not known may hold anything neutral.
        replace: Estimate -> the same with its known part; what it changes is the error.
        randn_like: Source of z; one noise for all labels.
        sigmas: Levels.

    Raises:
        ValueError: if there are so many classes that it would take minutes.
    """
    if denoiser.num_classes > MOST_CLASSES:
        what = f"the model has {denoiser.num_classes} classes, too many to try"
        raise ValueError(f"{what}; say which ones these images are: labels=")
    errors = images.new_zeros(denoiser.num_classes, len(images))
    for sigma in sigmas:
        noisy = add_noise(images, randn_like(images), sigma)
        level = images.new_full((len(images),), sigma)
        for label in range(denoiser.num_classes):
            estimate = denoiser(noisy, level, torch.full((len(images),), label, device=images.device))
            errors[label] += (replace(estimate) - estimate).square().flatten(1).sum(1)
    return errors.argmin(0)
