"""The denoising loss of EDM."""

from __future__ import annotations

from torch import Tensor

from consistency.losses.metrics import l2
from consistency.models.denoiser import Denoiser
from consistency.ops import append_dims


def denoising_loss(
    denoiser: Denoiser,
    images: Tensor,
    noise: Tensor,
    sigma: Tensor,
    *,
    weight: Tensor,
    labels: Tensor | None = None,
    augment_labels: Tensor | None = None,
) -> Tensor:
    """weight * mean over pixels of (D(x + sigma z; sigma) - x)^2; [B] (EDM, Eq. 2 and Table 1).

    The mean over pixels is OpenAI's convention, NVlabs sums: with Adam and RAdam only the loss plot differs.

    Args:
        denoiser: D.
        images: x, [B, C, H, W].
        noise: z ~ N(0, I), shape of `images`.
        sigma: [B].
        weight: lambda(sigma), [B].
        labels: [B] int64 or None.
        augment_labels: [B, 9] of augmented images, or None.
    """
    noisy = images + append_dims(sigma, images.ndim) * noise
    augment = () if augment_labels is None else (augment_labels,)
    return weight * l2(denoiser(noisy, sigma, labels, *augment), images)
