"""The training step that consistency training and distillation share; they differ in how x_lo is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consistency.losses.consistency import consistency_loss
from consistency.ops import append_dims


def consistency_step(
    method: Any, batch: tuple[Tensor, Tensor], make_x_lo: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
) -> dict[str, Any]:
    """Draw a pair of levels for each image, noise it, and compare the online network with the target (CM, Alg. 2, 3).

    Args:
        method: A LightningModule with denoiser, target, target_decay, draw, metric, weighting and progress.
        batch: Images [B, C, H, W] in [-1, 1] and labels [B].
        make_x_lo: `(x_hi, noise, sigma_hi, sigma_lo) -> x_lo`, without gradient.

    Returns:
        `loss`, and for callbacks `per_sample` [B], `sigma` [B] (the upper levels) and `schedule` (N(k), mu(k), ...).
    """
    images, labels = batch
    step = method.progress.step
    method.progress.count(len(images) * method.trainer.world_size)
    sigma_lo, sigma_hi = method.draw(step, len(images), images.device)
    noise = torch.randn_like(images)
    x_hi = images + append_dims(sigma_hi, images.ndim) * noise
    with torch.no_grad():
        x_lo = make_x_lo(x_hi, noise, sigma_hi, sigma_lo)
    loss = consistency_loss(
        method.denoiser,
        method.denoiser if method.target is None else method.target,
        x_hi,
        x_lo,
        sigma_hi,
        sigma_lo,
        metric=method.metric,
        weight=method.weighting(sigma_lo, sigma_hi),
        labels=labels,
    )
    schedule = method.draw.describe(step)
    if method.target_decay is not None:
        schedule["target_decay"] = method.target_decay(step)
    return {"loss": loss.mean(), "per_sample": loss.detach(), "sigma": sigma_hi, "schedule": schedule}
