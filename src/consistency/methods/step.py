"""What training steps share: the random draws, and the step of consistency training and distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consistency.losses.consistency import consistency_loss
from consistency.models.execution import begin_step
from consistency.ops import append_dims, seed_everywhere, send


def draw_batch(method: Any, images: Tensor, labels: Tensor) -> tuple[Any, Tensor, Tensor]:
    """Noise levels and noise of a micro-batch, the labels that it may see, and note its images in `progress`.

    They come from the random state, which differs between ranks; with `progress.image_seed` those of each image depend
    on its place in the whole run alone, whatever the number of ranks and micro-batches.

    Args:
        method: A LightningModule with draw and progress.
        images: [B, C, H, W].
        labels: [B] int64.

    Returns:
        What `method.draw` gives (sigma, or the pair sigma_lo, sigma_hi; each [B]), noise [B, C, H, W], and labels [B]
        of which the network's `label_dropout` has hidden some (-1).
    """
    begin_step(method.denoiser)
    progress, count = method.progress, len(images)
    seeds = progress.seeds_of_images(count, method.global_rank)
    step = progress.schedule_step
    progress.count(count * method.trainer.world_size)
    label_dropout = method.denoiser.network.label_dropout
    if seeds is None:
        levels, noise = method.draw(step, count, images.device), torch.randn_like(images)
        return levels, noise, _hide(labels, label_dropout)
    drawn = []
    for image, label, seed in zip(images, labels, seeds, strict=True):
        seed_everywhere(seed, images.device)
        level, own = method.draw(step, 1, images.device), torch.randn_like(image)
        drawn.append((level, own, _hide(label[None], label_dropout)))
    each_level, each_noise, each_label = zip(*drawn, strict=True)
    if isinstance(each_level[0], Tensor):
        levels = torch.cat(each_level)
    else:
        levels = tuple(torch.cat(parts) for parts in zip(*each_level, strict=True))
    return levels, torch.stack(each_noise), torch.cat(each_label)


def _hide(labels: Tensor, probability: float) -> Tensor:
    """Labels [B], each replaced by -1 with that probability; nothing is drawn where it is 0."""
    if probability == 0:
        return labels
    return torch.where(send(torch.rand(len(labels)) < probability, labels.device), -1, labels)


def consistency_step(
    method: Any, batch: tuple[Tensor, Tensor], make_x_lo: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
) -> dict[str, Any]:
    """Draw a pair of levels for each image, noise it, and compare the online network with the target (CM, Alg. 2, 3).

    Args:
        method: A LightningModule with denoiser, target, target_decay, draw, metric, weighting and progress.
        batch: Images [B, C, H, W] in [-1, 1] and labels [B].
        make_x_lo: `(x_hi, noise, sigma_hi, sigma_lo, labels) -> x_lo`, without gradient.

    Returns:
        `loss`, and for callbacks `per_sample` [B], `sigma` [B] (the upper levels) and `schedule` (N(k), mu(k), ...).
    """
    images, labels = batch
    step = method.progress.schedule_step
    (sigma_lo, sigma_hi), noise, labels = draw_batch(method, images, labels)
    x_hi = images + append_dims(sigma_hi, images.ndim) * noise
    with torch.no_grad():
        x_lo = make_x_lo(x_hi, noise, sigma_hi, sigma_lo, labels)
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
