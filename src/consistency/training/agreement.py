"""Processes that train one model must have one model: a cheap check while they train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from consistency.training.averaging import WeightEMA


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
    mine = torch.tensor(list(numbers.values()), dtype=torch.float64, device=trainer.strategy.root_device)
    everyone = trainer.strategy.all_gather(mine).reshape(trainer.world_size, -1)
    agree = torch.isclose(everyone, everyone[0], rtol=tolerance, atol=tolerance, equal_nan=True)
    for name, column, values in zip(numbers, agree.T, everyone.T, strict=True):
        if not column.all():
            rank = int((~column).nonzero()[0])
            raise RuntimeError(
                f"process {rank} has another {name} ({values[rank]:.9g}) than process 0 ({values[0]:.9g}): something "
                "draws or updates on one of them alone; do not trust the last checkpoint"
            )


class RankConsistencyCheck(Callback):
    """Every n optimizer steps compare online network, target and averages over ranks, by a number each.

    Added to every run by `runs.train`.

    Args:
        every_n_steps: Optimizer steps between two checks; those of the beginning come after steps 1, 2, 4, 8, ...
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        self.every_n_steps = every_n_steps
        self._last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Ranks that found other checkpoints would train one model from different places."""
        progress = pl_module.progress
        names = ("step", "schedule_step", "images_seen")
        check_ranks_agree(trainer, {f"progress.{name}": getattr(progress, name) for name in names})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check when it is due."""
        step = pl_module.progress.step
        if trainer.world_size == 1 or step == self._last_step:
            return
        self._last_step = step
        if step % self.every_n_steps == 0 or step & (step - 1) == 0:
            check_ranks_agree(trainer, _digests(trainer, pl_module))


def _digests(trainer: Any, pl_module: Any) -> dict[str, float]:
    digests = {"online network": _digest(pl_module.denoiser.parameters())}
    for module in pl_module.trained_modules():
        if module is not pl_module.denoiser:
            digests[f"trained {type(module).__name__}"] = _digest(module.parameters())
    if pl_module.target is not None:
        digests["target network"] = _digest(pl_module.target.parameters())
    for callback in trainer.callbacks:
        if isinstance(callback, WeightEMA):
            digests |= {f"average {name}": _digest(values.values()) for name, values in callback.averages.items()}
    return digests


@torch.no_grad()
def _digest(parameters: Iterable[Tensor]) -> float:
    norms = torch.stack(torch._foreach_norm(list(parameters), dtype=torch.float64))
    places = torch.arange(1, len(norms) + 1, device=norms.device)  # exchanged tensors are noticed too
    return (norms * places).sum().item()
