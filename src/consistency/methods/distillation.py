"""Consistency distillation (Song et al. 2023, Alg. 2)."""

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
from consistency.models.unet import UNet
from consistency.noise.draws import PairDraw
from consistency.sampling.views import guided


class ConsistencyDistillation(L.LightningModule):
    """Learn f(x, sigma) from a diffusion model: x_lo is one ODE step of the teacher from x_hi.

    The online and the target network have the teacher's architecture, start from its (EMA) weights, and take the
    consistency scalings; the teacher keeps the plain ones. The teacher is always in eval mode, the target in the mode
    of the online network, because they share dropout masks.

    Args:
        teacher: D_phi, an EDM model.
        solver: `euler_step` or `heun_step` (CM, Sec. 4; Heun is better at equal N, Fig. 3b).
        draw: `(step, batch, device) -> (sigma_lo, sigma_hi)`, each [B].
        metric: d.
        weighting: `(sigma_lo, sigma_hi) -> [B]`.
        optimizer: Parameters -> optimizer.
        target_decay: mu(k); None means mu = 0: the target is the online network (CM's CIFAR-10 runs).
        dropout: Of the online and target network; the papers' 0.
        guidance: Weight of classifier-free guidance of the teacher, which must have hidden labels in training; 1: none.
        lr_schedule: Optimizer -> schedule, stepped once per optimizer step; None for a constant rate.

    Raises:
        ValueError: if the teacher is itself a consistency model, or its noise range is not that of the draw.
    """

    def __init__(
        self,
        teacher: Denoiser,
        *,
        solver: Callable[..., Tensor],
        draw: PairDraw,
        metric: Metric,
        weighting: Callable[[Tensor, Tensor], Tensor],
        optimizer: Callable[..., torch.optim.Optimizer],
        target_decay: Callable[[int], float] | None = None,
        dropout: float = 0.0,
        guidance: float = 1.0,
        lr_schedule: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        if teacher.boundary != 0:
            raise ValueError(
                "the teacher must be a diffusion model (method=edm), got a consistency model; change teacher"
            )
        drawn = (getattr(draw, "sigma_min", teacher.sigma_min), getattr(draw, "sigma_max", teacher.sigma_max))
        if drawn != (teacher.sigma_min, teacher.sigma_max):
            raise ValueError(
                f"the teacher's noise range is {(teacher.sigma_min, teacher.sigma_max)}, the draw's is {drawn}; "
                "change noise.sigma_min and noise.sigma_max to the teacher's"
            )
        guided(teacher, guidance)  # refuses a teacher that cannot be
        self.guidance = guidance
        self.teacher = frozen_copy(teacher).eval()
        network = UNet(**{**teacher.network.config, "dropout": dropout})
        network.load_state_dict(teacher.network.state_dict())
        self.denoiser = Denoiser(network, **{**_own_config(teacher), "boundary": teacher.sigma_min})
        self.target = frozen_copy(self.denoiser) if target_decay is not None else None
        self.target_decay = target_decay
        self.solver, self.draw, self.metric, self.weighting = solver, draw, metric, weighting
        self.optimizer, self.lr_schedule = optimizer, lr_schedule
        self.progress = Progress()

    def train(self, mode: bool = True) -> ConsistencyDistillation:
        """Set the mode of everything but the teacher, which stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def on_fit_start(self) -> None:
        """Refuse a target that nothing moves."""
        check_target_moves(self.trainer, self.target)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        """One micro-batch; x_lo is the teacher's ODE step from x_hi."""
        teacher = guided(self.teacher, self.guidance)
        return consistency_step(
            self,
            batch,
            lambda x_hi, noise, sigma_hi, sigma_lo, labels: self.solver(teacher, x_hi, sigma_hi, sigma_lo, labels),
        )

    def configure_optimizers(self) -> Any:
        """The optimizer of the online network."""
        return configure_optimizer(self.denoiser.parameters(), self.optimizer, self.lr_schedule, self.progress)


def _own_config(denoiser: Denoiser) -> dict[str, Any]:
    return {name: value for name, value in denoiser.config.items() if name != "network"}
