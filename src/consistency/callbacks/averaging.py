"""The two averages of weights: the target network of the loss, and the averages that are sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from consistency.models.averages import ema_update_


class TargetEMA(Callback):
    """theta^- <- mu(k) theta^- + (1 - mu(k)) theta after optimizer step k (CM, Alg. 2, 3; iCT, Eq. 4).

    mu is read at the step k whose loss was just minimised, before the counter moves on, as in OpenAI's code. Does
    nothing for a method without a target.
    """

    moves_target = True

    def __init__(self) -> None:
        self._last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start counting where the run stands."""
        self._last_step = pl_module.progress.step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the target if an optimizer step happened."""
        step = pl_module.progress.step
        # Compare counters: this hook also fires between accumulated micro-batches and after skipped fp16 steps.
        if pl_module.target is None or step == self._last_step:
            return
        self._last_step = step
        ema_update_(pl_module.target.parameters(), pl_module.denoiser.parameters(), pl_module.target_decay(step - 1))


class WeightEMA(Callback):
    """Averages of the denoiser's weights at several rates, for sampling and export; never part of a gradient.

    After optimizer step k: average <- beta average + (1 - beta) theta, beta = min(decay, (1 + k) / (10 + k)): the
    warm-up keeps early averages from being mostly the random start. They live in this callback and its checkpoint;
    only the denoiser is averaged, the raw weights stay where they are.

    Args:
        decays: Rates per optimizer step; the first is the one that is sampled and exported. iCT uses 0.99993.
        warmup: Whether beta ramps up.
    """

    state_key = "WeightEMA"

    def __init__(self, decays: list[float], *, warmup: bool = True) -> None:
        decays = list(decays)
        if not decays or not all(0 <= decay < 1 for decay in decays) or len(set(decays)) != len(decays):
            raise ValueError(
                f"decays must be different numbers in [0, 1), got {decays}; change callbacks.weight_ema.decays"
            )
        self.decays, self.warmup = decays, warmup
        self.averages: dict[str, dict[str, Tensor]] = {}
        self._last_step = 0

    def name(self, decay: float | None = None) -> str:
        """Name of the weights of a rate (the first by default), e.g. `ema0.999`: files and logs carry it."""
        return f"ema{self.decays[0] if decay is None else decay:g}"

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start from the online weights, or move restored averages to the device."""
        self._last_step = pl_module.progress.step
        parameters = dict(pl_module.denoiser.named_parameters())
        for decay in self.decays:
            name = self.name(decay)
            if name not in self.averages:
                if self._last_step > 0:
                    raise ValueError(
                        f"the checkpoint holds no average {name} (it has {sorted(self.averages)}); set "
                        "callbacks.weight_ema.decays to those, or start another run with run_name="
                    )
                self.averages[name] = {key: value.detach().clone() for key, value in parameters.items()}
            self.averages[name] = {key: value.to(parameters[key].device) for key, value in self.averages[name].items()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update every average if an optimizer step happened."""
        step = pl_module.progress.step
        if step == self._last_step:
            return
        self._last_step = step
        values = list(pl_module.denoiser.parameters())
        for decay in self.decays:
            beta = min(decay, step / (9 + step)) if self.warmup else decay
            ema_update_(self.averages[self.name(decay)].values(), values, beta)

    @contextmanager
    def applied(self, pl_module: Any, decay: float | None = None) -> Iterator[str]:
        """Within the context the denoiser holds an average (the first by default); yields its name."""
        name = self.name(decay)
        parameters = dict(pl_module.denoiser.named_parameters())
        raw = {key: value.detach().clone() for key, value in parameters.items()}
        try:
            _copy_into(parameters, self.averages[name])
            yield name
        finally:
            _copy_into(parameters, raw)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and names only, so that `torch.load(weights_only=True)` reads it."""
        return {"averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the averages."""
        self.averages = state_dict["averages"]


@torch.no_grad()
def _copy_into(parameters: dict[str, Any], values: dict[str, Tensor]) -> None:
    for key, parameter in parameters.items():
        parameter.copy_(values[key])
