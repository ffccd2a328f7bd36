"""What every method keeps of its training run: counters of its own, and the options of its optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from consistency.ops import derive_seed


class Progress(nn.Module):
    """Optimizer steps done and images seen; saved and restored with the state dict of the method.

    Lightning's `global_step` counts optimizer *calls*, this counts steps that happened: a step that the fp16 scaler
    skips does not count. Images of micro-batches are `pending` until their step is done.

    Schedules follow `schedule_step`, which is `step` as long as the batch stays the same. A run that goes on with
    another batch has its schedules where they were *in images*: after 1,000 steps of 128, the next step of 256 is the
    500th of its schedules.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.images_seen = 0
        self.pending = 0
        self.total_steps: int | None = None
        self.batch_size: int | None = None  # images of an optimizer step; set before a state is loaded
        self.first_batch_size: int | None = None  # of the session in which the run began
        self.was_converted = False  # the state was of another batch
        self.image_seed: int | None = None  # with it each image has random numbers of its own; see StepSeeds
        self._schedule_offset = 0

    @property
    def schedule_step(self) -> int:
        """k of the papers, in steps of the present batch."""
        return self.step + self._schedule_offset

    @property
    def is_over(self) -> bool:
        """Whether the run has done its `total_steps`; False where nobody said how many."""
        return self.total_steps is not None and self.schedule_step >= self.total_steps

    @property
    def batch_ratio(self) -> float:
        """The present batch in units of the first: averages per step go as far with each image as they did."""
        return (self.batch_size or 1) / (self.first_batch_size or self.batch_size or 1)

    def seeds_of_images(self, count: int, rank: int, purpose: str = "noise") -> list[int] | None:
        """A seed for each image of the next micro-batch of this rank, of its place in the run; None: one for all."""
        if self.image_seed is None:
            return None
        first = self.images_seen + self.pending + rank * count  # consecutive places, as data/module.py deals them out
        return [derive_seed(purpose, self.image_seed, place) for place in range(first, first + count)]

    def count(self, num_images: int) -> None:
        """Note images (over all ranks) that entered a forward pass."""
        self.pending += num_images

    def advance(self) -> None:
        """Note a finished optimizer step."""
        self.step += 1
        self.images_seen += self.pending
        self.pending = 0

    def get_extra_state(self) -> dict[str, int]:
        """Part of the state dict; `schedule_step` and batches are there where the batch is known."""
        state = {"step": self.step, "images_seen": self.images_seen}
        if self.batch_size is None:
            return state
        first = self.first_batch_size or self.batch_size
        return {
            **state,
            "schedule_step": self.schedule_step,
            "batch_size": self.batch_size,
            "first_batch_size": first,
        }

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore; images of an unfinished step will be seen again."""
        self.step, self.images_seen, self.pending = state["step"], state["images_seen"], 0
        schedule_step, before = state.get("schedule_step", self.step), state.get("batch_size")
        self.first_batch_size = state.get("first_batch_size")
        self.was_converted = None not in (before, self.batch_size) and before != self.batch_size
        if before is not None and self.batch_size is not None:
            schedule_step = schedule_step * before // self.batch_size
        self._schedule_offset = schedule_step - self.step


def set_options(optimizer: Optimizer, schedules: Iterable[Any], options: Sequence[Mapping[str, Any]]) -> None:
    """Give an optimizer whose state was loaded the options of now: a state holds those that it was saved with.

    Moments get the memory order of their weights, which `channels_last` may have changed in between: fused optimizers
    go through memory as it lies.

    Args:
        optimizer: After loading.
        schedules: Its learning rate schedules; they keep their place.
        options: Of each parameter group: lr (without the schedule's factor), betas, weight_decay, ...
    """
    for group, now in zip(optimizer.param_groups, options, strict=True):
        base = group.get("initial_lr", group["lr"])
        group["lr"] = now["lr"] if base == group["lr"] else group["lr"] * now["lr"] / base
        if "initial_lr" in group:
            group["initial_lr"] = now["lr"]
        group.update({name: now[name] for name in group.keys() & now.keys() - {"params", "lr", "initial_lr"}})
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    for schedule in schedules:
        schedule.base_lrs = [now["lr"] for now in options]


def linear_warmup(optimizer: Optimizer, *, images: int, batch_size: int) -> LambdaLR:
    """The rate grows linearly from 0 to its full value over so many images (EDM: 10 million; `lr_rampup`).

    Args:
        optimizer: Whose rates are scaled.
        images: Length of the warm-up.
        batch_size: Images of one optimizer step.
    """
    return LambdaLR(optimizer, lambda step: min(step * batch_size / images, 1.0))
