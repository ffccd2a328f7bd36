"""What every method keeps of its training run: counters of its own, the optimizer, the rule for targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Progress(nn.Module):
    """Optimizer steps done and images seen; saved and restored with the state dict of the method.

    Lightning's `global_step` counts optimizer *calls*, this counts steps that happened: a step that the fp16 scaler
    skips does not count. Images of micro-batches are `pending` until their step is done.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.images_seen = 0
        self.pending = 0
        self.total_steps: int | None = None

    @property
    def is_over(self) -> bool:
        """Whether the run has done its `total_steps`; False where nobody said how many."""
        return self.total_steps is not None and self.step >= self.total_steps

    def count(self, num_images: int) -> None:
        """Note images (over all ranks) that entered a forward pass."""
        self.pending += num_images

    def advance(self) -> None:
        """Note a finished optimizer step."""
        self.step += 1
        self.images_seen += self.pending
        self.pending = 0

    def get_extra_state(self) -> dict[str, int]:
        """Part of the state dict."""
        return {"step": self.step, "images_seen": self.images_seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore; images of an unfinished step will be seen again."""
        self.step, self.images_seen, self.pending = state["step"], state["images_seen"], 0


def configure_optimizer(
    parameters: Iterable[Tensor],
    optimizer: Callable[[Iterable[Tensor]], Optimizer],
    lr_schedule: Callable[[Optimizer], Any] | None,
    progress: Progress,
) -> dict[str, Any]:
    """Lightning's optimizer dictionary; `progress` advances with each step that really happens.

    Args:
        parameters: What to train.
        optimizer: Parameters -> optimizer.
        lr_schedule: Optimizer -> schedule that is stepped once per optimizer step, or None.
        progress: Counters of the method.
    """
    built = optimizer(parameters)
    # A hook of the optimizer itself, because GradScaler does not call `step` when it skips one.
    built.register_step_post_hook(lambda *_: progress.advance())
    if lr_schedule is None:
        return {"optimizer": built}
    return {"optimizer": built, "lr_scheduler": {"scheduler": lr_schedule(built), "interval": "step"}}


def linear_warmup(optimizer: Optimizer, *, images: int, batch_size: int) -> LambdaLR:
    """The rate grows linearly from 0 to its full value over so many images (EDM: 10 million; `lr_rampup`).

    Args:
        optimizer: Whose rates are scaled.
        images: Length of the warm-up.
        batch_size: Images of one optimizer step.
    """
    return LambdaLR(optimizer, lambda step: min(step * batch_size / images, 1.0))


def check_target_moves(trainer: Trainer, target: nn.Module | None) -> None:
    """Raise unless something moves the target network: one that silently stays put ruins the run."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if target is not None and not any(getattr(callback, "moves_target", False) for callback in callbacks):
        raise ValueError(
            "this method has a target network (curriculum.target_decay is set), but no TargetEMA callback moves it; "
            "restore callbacks.target_ema, or set curriculum.target_decay=null for mu = 0"
        )
