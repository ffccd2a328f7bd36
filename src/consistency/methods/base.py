"""What every training method is: a step of plain torch, and a LightningModule around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from consistency.methods.progress import Progress
from consistency.methods.random import Random, RandomOfImages
from consistency.models.denoiser import KINDS, Denoiser
from consistency.models.execution import begin_step


class Step(NamedTuple):
    """What a training step gives."""

    loss: Tensor  # [B], per image, never reduced over the batch
    sigma: Tensor  # [B], the level that an image's loss belongs to, for logs
    log: dict[str, float | Tensor] = {}  # further columns of the log, e.g. N(k); tensors are read when a row is due


class Method(L.LightningModule):
    """A training method: subclasses write `step`, one algorithm box of a paper, in plain torch.

    The base class owns the optimizer and its schedule, counts steps and images (`progress`), hides labels for guidance,
    and marks the beginning of a step for CUDA graphs. A subclass of your own: `method._target_=mine.MyMethod`.

    A subclass says of itself
        kind: what its denoisers are: `diffusion`, `consistency` or `flow_map`; see `Denoiser`.
        takes_augment_labels: whether `step` has the keyword `augment_labels`; only then data may be augmented.
        target, target_decay: theta^- and mu(k), moved by the callback `TargetEMA`; None where there is none.

    Args:
        denoiser: The online network with its preconditioning.
        optimizer: Parameters -> optimizer; needed to train by Lightning, not for a loop of one's own around `step`.
        lr_schedule: Optimizer -> schedule, stepped once per optimizer step; None for a constant rate.

    Raises:
        ValueError: if the subclass has no `step`, or the denoiser's boundary contradicts `kind`.
    """

    kind: ClassVar[str] = "consistency"
    takes_augment_labels: ClassVar[bool] = False
    levels: Any  # of subclasses

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        lr_schedule: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        if type(self).step is Method.step:
            raise ValueError(f"{type(self).__name__} has no step(images, labels, k, random) -> Step; write one")
        if self.kind not in KINDS:
            raise ValueError(f"{type(self).__name__}.kind is {self.kind}; allowed: {', '.join(KINDS)}")
        if self.kind == "diffusion" and denoiser.boundary != 0:
            raise ValueError(
                f"{type(self).__name__} trains a diffusion model, whose boundary is 0, got boundary "
                f"{denoiser.boundary}; change parametrization.boundary"
            )
        denoiser.kind = self.kind
        self.denoiser = denoiser
        self.target: Denoiser | None = None
        self.target_decay: Callable[[int], float] | None = None
        self.optimizer, self.lr_schedule = optimizer, lr_schedule
        self.progress = Progress()
        self.stratified = False  # noise levels of a batch; see `Random`

    def step(self, images: Tensor, labels: Tensor, k: int, random: Random) -> Step:
        """One training step's mathematics, without Lightning. Methods that take them have `augment_labels` as well.

        Args:
            images: x, [B, C, H, W] in [-1, 1].
            labels: [B] int64; -1 where a label is hidden or there is none.
            k: Optimizer steps so far, which curricula follow.
            random: Source of noise levels and noise; nothing else should be drawn, but dropout masks.
        """
        raise AssertionError("the constructor refuses a method without a step")

    @property
    def network_passes(self) -> int:
        """Forward passes without gradient of an image in a step, beside the online network's own: for estimates."""
        return 0

    def trained_modules(self) -> list[nn.Module]:
        """What is optimized and watched; a method with more than the denoiser adds it here."""
        return [self.denoiser]

    def trained_parameters(self) -> list[nn.Parameter]:
        """Parameters of `trained_modules`."""
        return [parameter for module in self.trained_modules() for parameter in module.parameters()]

    def networks(self) -> list[Denoiser]:
        """All denoisers of the method: online, target, teacher."""
        return [child for child in self.children() if isinstance(child, Denoiser)]

    def on_fit_start(self) -> None:
        """Refuse what would ruin the run silently: a target that nothing moves, a model that cannot be saved."""
        _ = self.denoiser.config
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.target is not None and not any(getattr(callback, "moves_target", False) for callback in callbacks):
            raise ValueError(
                "this method has a target network (curriculum.target_decay is set), but no TargetEMA callback moves "
                "it; restore callbacks.target_ema, or set curriculum.target_decay=null for mu = 0"
            )

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Any]:
        """One micro-batch: images, labels and perhaps augmentation labels.

        Returns:
            `loss`, and for callbacks `per_sample` [B], `sigma` [B] and `schedule` (the step's log, and mu(k)).
        """
        images, labels, *augment = batch
        begin_step(self.denoiser)
        k = self.progress.schedule_step
        random = self._random(len(images))
        if (hidden := self.denoiser.label_dropout) > 0:  # for all networks of the step
            labels = torch.where(random.coin(images, hidden), -1, labels)
        self.progress.count(len(images) * self.trainer.world_size)
        extra: dict[str, Any] = {"augment_labels": augment[0]} if augment else {}
        step = self.step(images, labels, k, random, **extra)
        if not isinstance(step, Step) or not step.loss.shape == step.sigma.shape == (len(images),):
            got = (
                f"loss {list(step.loss.shape)}, sigma {list(step.sigma.shape)}"
                if isinstance(step, Step)
                else type(step)
            )
            raise ValueError(
                f"{type(self).__name__}.step gave {got}; allowed: Step(loss, sigma), each one number an image "
                f"[{len(images)}]"
            )
        schedule = dict(step.log)
        if self.target_decay is not None:
            schedule["target_decay"] = self.target_decay(k)
        return {"loss": step.loss.mean(), "per_sample": step.loss.detach(), "sigma": step.sigma, "schedule": schedule}

    def configure_optimizers(self) -> Any:
        """The optimizer of the trained modules; `progress` advances with each of its steps that really happens."""
        if self.optimizer is None:
            raise ValueError(f"{type(self).__name__} was made without an optimizer; give optimizer=")
        trained = self.trained_parameters()
        known = set(map(id, trained))
        if left := [name for name, p in self.named_parameters() if p.requires_grad and id(p) not in known]:
            raise ValueError(
                f"{type(self).__name__} has the parameter {left[0]}, which nothing trains; name its module in "
                "trained_modules(), or give it requires_grad_(False)"
            )
        built = self.optimizer(trained)

        def count(*_: Any) -> None:
            # Without gradients nothing was changed: the step was skipped (callbacks.alarms).
            if any(parameter.grad is not None for group in built.param_groups for parameter in group["params"]):
                self.progress.advance()

        # A hook of the optimizer itself, because GradScaler does not call `step` when it skips one.
        built.register_step_post_hook(count)
        if self.lr_schedule is None:
            return {"optimizer": built}
        return {"optimizer": built, "lr_scheduler": {"scheduler": self.lr_schedule(built), "interval": "step"}}

    def _random(self, count: int) -> Random:
        """What the step of the next `count` images of this rank draws from."""
        seeds = self.progress.seeds_of_images(count, self.global_rank)
        if seeds is not None:
            return RandomOfImages(seeds)
        return Random(strata=(self.global_rank, self.trainer.world_size) if self.stratified else None)
