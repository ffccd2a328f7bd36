"""Consistency distillation (Song et al. 2023, Alg. 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from consistency.methods.training import ConsistencyTraining
from consistency.models.averages import frozen_copy
from consistency.models.denoiser import Denoiser
from consistency.models.register import rebuilt
from consistency.ops import add_noise
from consistency.sampling.steps import heun_step
from consistency.sampling.wrappers import guided


class ConsistencyDistillation(ConsistencyTraining):
    """Learn f(x, sigma) from a diffusion model: x_lo is one ODE step of the teacher from x_hi.

    The online and the target network have the teacher's architecture, start from its (EMA) weights, and take the
    consistency boundary at sigma_min; the teacher keeps the plain one. The teacher is always in eval mode, the target
    in the mode of the online network, because they share dropout masks.

    Args:
        teacher: D_phi, a diffusion model.
        solver: `euler_step` or `heun_step` (CM, Sec. 4; Heun is better at equal N, Fig. 3b).
        dropout: Of the online and target network; the papers' 0.
        guidance: Weight of classifier-free guidance of the teacher, which must have hidden labels in training; 1: none.
        **options: levels, metric, weighting, target_decay (None: CM's CIFAR-10 runs), optimizer and lr_schedule, as of
            `ConsistencyTraining`.

    Raises:
        ValueError: if the teacher is itself a consistency model, or its noise range is not that of the levels.
    """

    def __init__(
        self,
        teacher: Denoiser,
        *,
        solver: Callable[..., Tensor],
        dropout: float = 0.0,
        guidance: float = 1.0,
        **options: Any,
    ) -> None:
        if teacher.kind != "diffusion":
            raise ValueError(
                f"the teacher must be a diffusion model (method=edm), got a {teacher.kind} model; change teacher"
            )
        levels = options.get("levels")
        drawn = (getattr(levels, "sigma_min", teacher.sigma_min), getattr(levels, "sigma_max", teacher.sigma_max))
        if drawn != (teacher.sigma_min, teacher.sigma_max):
            raise ValueError(
                f"the teacher's noise range is {(teacher.sigma_min, teacher.sigma_max)}, that of the levels is "
                f"{drawn}; change model.sigma_min and model.sigma_max to the teacher's"
            )
        guided(teacher, guidance)  # refuses a teacher that cannot be
        super().__init__(_student(teacher, dropout), **options)
        self.teacher = frozen_copy(teacher).eval()
        self.solver, self.guidance = solver, guidance

    @property
    def network_passes(self) -> int:
        """One of the target, and the teacher's in its step."""
        evaluations = 2 if getattr(self.solver, "func", self.solver) is heun_step else 1
        return 1 + evaluations * (1 if self.guidance == 1 else 2)

    def train(self, mode: bool = True) -> ConsistencyDistillation:
        """Set the mode of everything but the teacher, which stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def neighbour(self, x: Tensor, z: Tensor, sigma_hi: Tensor, sigma_lo: Tensor, labels: Tensor) -> Tensor:
        """x_lo, the teacher's ODE step from x_hi."""
        teacher = guided(self.teacher, self.guidance)
        return self.solver(teacher, add_noise(x, z, sigma_hi), sigma_hi, sigma_lo, labels)


def _student(teacher: Denoiser, dropout: float) -> Denoiser:
    """A denoiser with the teacher's weights whose boundary is sigma_min."""
    arguments = {"dropout": dropout} if "dropout" in teacher.network.config else {}  # type: ignore[operator]
    if dropout and not arguments:
        raise ValueError(f"the teacher's network has no dropout, got dropout={dropout}; set method.dropout=0")
    own: Any = teacher.parametrization
    if "boundary" not in {field.name for field in fields(own)}:
        raise ValueError(
            f"the teacher's parametrization {type(own).__name__} has no field boundary, which a consistency model "
            "needs at sigma_min; give it one"
        )
    return Denoiser(
        rebuilt(teacher.network, **arguments),
        replace(own, boundary=teacher.sigma_min),
        kind="consistency",
        sigma_min=teacher.sigma_min,
        sigma_max=teacher.sigma_max,
        label_dropout=teacher.label_dropout,
    )
