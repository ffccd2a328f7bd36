"""EDM: denoising score matching (Karras et al. 2022). Its models are samplers' denoisers and CD's teachers.

Flow matching (method=flow) is this class with other parts: t uniform, the scalings and the weighting of the velocity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from consistency.losses.denoising import denoising_loss
from consistency.methods.progress import Progress, configure_optimizer
from consistency.methods.step import draw_batch
from consistency.models.denoiser import Denoiser


class EDM(L.LightningModule):
    """Train D(x; sigma) to remove noise.

    Args:
        denoiser: D, with its boundary at 0.
        draw: `(step, batch, device) -> sigma [B]`.
        weighting: `(sigma, sigma) -> [B]`.
        optimizer: Parameters -> optimizer.
        lr_schedule: Optimizer -> schedule, stepped once per optimizer step; None for a constant rate.

    Raises:
        ValueError: if the denoiser is a consistency function (its boundary is not at 0).
    """

    target = None
    target_decay = None

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        draw: Callable[..., Tensor],
        weighting: Callable[[Tensor, Tensor], Tensor],
        optimizer: Callable[..., torch.optim.Optimizer],
        lr_schedule: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        if denoiser.boundary != 0:
            raise ValueError(f"EDM needs plain scalings (boundary 0), got boundary {denoiser.boundary}; set boundary=0")
        self.denoiser = denoiser
        self.draw, self.weighting = draw, weighting
        self.optimizer, self.lr_schedule = optimizer, lr_schedule
        self.progress = Progress()

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Any]:
        """Loss of one micro-batch, with `per_sample` [B] and `sigma` [B] for callbacks.

        `batch` is images and labels, and augmentation labels where the data are augmented.
        """
        images, labels, *augment = batch
        sigma, noise, labels = draw_batch(self, images, labels)
        loss = denoising_loss(
            self.denoiser,
            images,
            noise,
            sigma,
            weight=self.weighting(sigma, sigma),
            labels=labels,
            augment_labels=augment[0] if augment else None,
        )
        return {"loss": loss.mean(), "per_sample": loss.detach(), "sigma": sigma, "schedule": {}}

    def configure_optimizers(self) -> Any:
        """The optimizer of the denoiser."""
        return configure_optimizer(self.denoiser.parameters(), self.optimizer, self.lr_schedule, self.progress)
