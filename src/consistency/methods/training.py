"""Consistency training: CT (Song et al. 2023), iCT (Song & Dhariwal 2023) and ECT (Geng et al. 2024) are one class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from consistency.losses.consistency import Metric
from consistency.methods.progress import Progress, check_target_moves, configure_optimizer
from consistency.methods.step import consistency_step
from consistency.models.averages import frozen_copy
from consistency.models.denoiser import Denoiser
from consistency.noise.draws import PairDraw
from consistency.ops import append_dims


class ConsistencyTraining(L.LightningModule):
    """Learn f(x, sigma) from data alone: x_hi and x_lo are one image under one noise at two levels (CM, Alg. 3).

    | | CT | iCT | ECT |
    |---|---|---|---|
    | draw | neighbours on a grid, uniform | neighbours, lognormal | ratio of a lognormal |
    | target_decay | mu(k), adaptive | None: mu = 0 | None |
    | metric | LPIPS or l2 | Pseudo-Huber | Pseudo-Huber, c = 0 |
    | weighting | uniform | 1 / gap | 1 / gap |
    | start | random | random | an EDM model |

    Args:
        denoiser: f_theta, the online network.
        draw: `(step, batch, device) -> (sigma_lo, sigma_hi)`, each [B].
        metric: d.
        weighting: `(sigma_lo, sigma_hi) -> [B]`.
        optimizer: Parameters -> optimizer.
        target_decay: mu(k). None means mu = 0: the target is the online network itself and no copy is kept.
        lr_schedule: Optimizer -> schedule, stepped once per optimizer step; None for a constant rate.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        draw: PairDraw,
        metric: Metric,
        weighting: Callable[[Tensor, Tensor], Tensor],
        optimizer: Callable[..., torch.optim.Optimizer],
        target_decay: Callable[[int], float] | None = None,
        lr_schedule: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.target = frozen_copy(denoiser) if target_decay is not None else None
        self.target_decay = target_decay
        self.draw, self.metric, self.weighting = draw, metric, weighting
        self.optimizer, self.lr_schedule = optimizer, lr_schedule
        self.progress = Progress()

    def on_fit_start(self) -> None:
        """Refuse a target that nothing moves."""
        check_target_moves(self.trainer, self.target)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        """One micro-batch; x_lo is the same image under the same noise at sigma_lo."""
        images, _ = batch
        return consistency_step(
            self, batch, lambda x_hi, noise, sigma_hi, sigma_lo, _: images + append_dims(sigma_lo, images.ndim) * noise
        )

    def configure_optimizers(self) -> Any:
        """The optimizer of the online network."""
        return configure_optimizer(self.denoiser.parameters(), self.optimizer, self.lr_schedule, self.progress)
