"""Callbacks of every run: seeds of its steps, where it ends, a check that all processes train one model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from consistency.methods.base import Method
from consistency.ops import derive_seed, seed_everywhere
from consistency.training.averaging import WeightEMA
from consistency.training.triggers import find_callback


class StepSeeds(Callback):
    """Seed each micro-batch anew from (seed, rank, images seen so far).

    Noise, levels and dropout then differ between ranks (`seed_everything` gives all ranks the same), do not depend on
    what else drew random numbers before (sampling, evaluation), and a resumed run draws what the straight run would
    have drawn.

    With `per_image` the levels, the noise, flips and augmentation of each image depend on (seed, its place in the run)
    instead: one process and two with an equal global batch then train alike, up to rounding. Dropout masks still
    belong to the rank. Each image costs a seed, so this is for comparisons.

    Args:
        seed: Of the run.
        per_image: Whether random numbers belong to images and not to ranks.
        stratified: Whether the noise levels of a micro-batch are spread evenly over their distribution, on all ranks
            together; see `Random`.
    """

    def __init__(self, seed: int, *, per_image: bool = False, stratified: bool = False) -> None:
        self.seed, self.per_image, self.stratified = seed, per_image, stratified

    def on_fit_start(self, trainer: L.Trainer, pl_module: Method) -> None:
        """Set what the method's random numbers belong to."""
        pl_module.progress.image_seed = self.seed if self.per_image else None
        pl_module.stratified = self.stratified

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Method, batch: Any, batch_idx: int) -> None:
        """Seed the CPU and the device."""
        position = pl_module.progress.images_seen + pl_module.progress.pending
        seed_everywhere(derive_seed("step", self.seed, trainer.global_rank, position), pl_module.device)


class StopAtStep(Callback):
    """Stop when `progress.schedule_step` reaches `total_steps`.

    Lightning's own `max_steps` counts optimizer *calls*: after one step that the fp16 scaler skipped, a run would end
    one step short of its curriculum. Other callbacks see the end in `progress.is_over`.

    Args:
        total_steps: Optimizer steps of the run.
    """

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps

    def on_fit_start(self, trainer: L.Trainer, pl_module: Method) -> None:
        """Set how long the method trains."""
        pl_module.progress.total_steps = self.total_steps

    def on_train_start(self, trainer: L.Trainer, pl_module: Method) -> None:
        """Make no further step where a resumed run stands at its end."""
        trainer.should_stop = pl_module.progress.is_over

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Method, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after the last step."""
        if pl_module.progress.is_over:
            trainer.should_stop = True


class RankConsistencyCheck(Callback):
    """Every n optimizer steps compare trained modules, target and averages over ranks, by a number each.

    Args:
        every_n_steps: Optimizer steps between two checks; those of the beginning come after steps 1, 2, 4, 8, ...
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        self.every_n_steps = every_n_steps
        self._last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Method) -> None:
        """Ranks that found other checkpoints would train one model from different places."""
        progress = pl_module.progress
        names = ("step", "schedule_step", "images_seen")
        check_ranks_agree(trainer, {f"progress.{name}": getattr(progress, name) for name in names})

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Method, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check when it is due."""
        step = pl_module.progress.step
        if trainer.world_size == 1 or step == self._last_step:
            return
        self._last_step = step
        if step % self.every_n_steps == 0 or step & (step - 1) == 0:
            check_ranks_agree(trainer, _digests(trainer, pl_module))


def check_ranks_agree(trainer: L.Trainer, numbers: Mapping[str, float], *, tolerance: float = 1e-12) -> None:
    """Compare numbers over all ranks, which all call this at the same place; nothing happens with one process.

    Args:
        trainer: Lightning's.
        numbers: Name -> number.
        tolerance: Of equal numbers, relative and absolute.

    Raises:
        RuntimeError: with the first number that differs by more than rounding.
    """
    if trainer.world_size == 1:
        return
    own = torch.tensor(list(numbers.values()), dtype=torch.float64, device=trainer.strategy.root_device)
    everyone = trainer.strategy.all_gather(own).reshape(trainer.world_size, -1)
    agree = torch.isclose(everyone, everyone[0], rtol=tolerance, atol=tolerance, equal_nan=True)
    for name, column, values in zip(numbers, agree.T, everyone.T, strict=True):
        if not column.all():
            rank = int((~column).nonzero()[0])
            raise RuntimeError(
                f"process {rank} has another {name} ({values[rank]:.9g}) than process 0 ({values[0]:.9g}): something "
                "draws or updates on one of them alone; do not trust the last checkpoint"
            )


def _digests(trainer: L.Trainer, method: Method) -> dict[str, float]:
    digests = {"online network": _digest(method.denoiser.parameters())}
    for module in method.trained_modules():
        if module is not method.denoiser:
            digests[f"trained {type(module).__name__}"] = _digest(module.parameters())
    if method.target is not None:
        digests["target network"] = _digest(method.target.parameters())
    if (average := find_callback(trainer, WeightEMA)) is not None:
        digests |= {f"average {name}": _digest(values.values()) for name, values in average.averages.items()}
    return digests


@torch.no_grad()
def _digest(parameters: Iterable[Tensor]) -> float:
    norms = torch.stack([torch.linalg.vector_norm(parameter, dtype=torch.float64) for parameter in parameters])
    places = torch.arange(1, len(norms) + 1, device=norms.device)  # exchanged tensors are noticed too
    return (norms * places).sum().item()
