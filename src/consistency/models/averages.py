"""Averages of weights: the update, and frozen copies to average into."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def ema_update_(averages: Iterable[Tensor], values: Iterable[Tensor], decay: float) -> None:
    """averages <- decay * averages + (1 - decay) * values, in place (iCT, Eq. 4)."""
    torch._foreach_lerp_(list(averages), list(values), 1 - decay)


def frozen_copy(module: Module) -> Module:
    """A deep copy without gradients, in the train or eval mode of the original; callers choose the mode."""
    return copy.deepcopy(module).requires_grad_(False)
