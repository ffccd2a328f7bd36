"""What training steps share: the random draws, and the step of consistency training and distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consistency.losses.consistency import consistency_loss
from consistency.ops import append_dims


def draw_batch(method: Any, images: Tensor) -> tuple[Any, Tensor]:
    """Noise levels and noise of a micro-batch, and note its images in `progress`.

    They come from the random state, which differs between ranks; with `progress.image_seed` those of each image depend
    on its place in the whole run alone, whatever the number of ranks and micro-batches.

    Args:
        method: A LightningModule with draw and progress.
        images: [B, C, H, W].

    Returns:
        What `method.draw` gives (sigma, or the pair sigma_lo, sigma_hi; each [B]), and noise [B, C, H, W].
    """
    progress, count = method.progress, len(images)
    seeds = progress.seeds_of_images(count, method.global_rank)
    step = progress.schedule_step
    progress.count(count * method.trainer.world_size)
    if seeds is None:
        return method.draw(step, count, images.device), torch.randn_like(images)
    levels, noise = [], []
    for image, seed in zip(images, seeds, strict=True):
        torch.manual_seed(seed)
        levels.append(method.draw(step, 1, images.device))
        noise.append(torch.randn_like(image))
    if isinstance(levels[0], Tensor):
        return torch.cat(levels), torch.stack(noise)
    return tuple(torch.cat(parts) for parts in zip(*levels, strict=True)), torch.stack(noise)


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
    step = method.progress.schedule_step
    (sigma_lo, sigma_hi), noise = draw_batch(method, images)
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
