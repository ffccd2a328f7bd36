"""The two averages of weights: the target network of the loss, and the averages that are sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from consistency.methods.base import Method
from consistency.models.averages import ema_update_
from consistency.training.triggers import find_callback

RAMP_UP = 0.05  # longest half-life in units of the images seen (EDM, App. F.2)


class TargetEMA(Callback):
    """theta^- <- mu(k) theta^- + (1 - mu(k)) theta after optimizer step k (CM, Alg. 2, 3; iCT, Eq. 4).

    mu is read at the step k whose loss was just minimised, before the counter moves on, as in OpenAI's code. Does
    nothing for a method without a target.
    """

    moves_target = True

    def __init__(self) -> None:
        self._last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Method) -> None:
        """Start counting where the run stands."""
        self._last_step = pl_module.progress.step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Method, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the target if an optimizer step happened."""
        step = pl_module.progress.step
        # Compare counters: this hook also fires between accumulated micro-batches and after skipped fp16 steps.
        if pl_module.target is None or pl_module.target_decay is None or step == self._last_step:
            return
        self._last_step = step
        mu = pl_module.target_decay(pl_module.progress.schedule_step - 1)
        ema_update_(pl_module.target.parameters(), pl_module.denoiser.parameters(), mu)


class WeightEMA(Callback):
    """Averages of the denoiser's weights at several rates, for sampling and export; never part of a gradient.

    After optimizer step k: average <- beta average + (1 - beta) theta. A decay is beta per step; a half-life h in
    images is beta = 0.5^(images of the step / h), which means the same at every batch. The warm-up keeps early averages
    from being mostly the random start: beta is at most (1 + k) / (10 + k), h at most 5 % of the images seen (EDM). The
    averages live in this callback and its checkpoint; only the denoiser is averaged, the raw weights stay where they
    are.

    Args:
        decays: Rates per optimizer step, of the batch that the run began with. iCT uses 0.99993 on CIFAR-10.
        half_lives: Half-lives in images, e.g. EDM's 500,000 on CIFAR-10.
        warmup: Whether beta ramps up.

    The first of `decays`, or else of `half_lives`, is the one that is sampled and exported.
    """

    state_key = "WeightEMA"

    def __init__(self, decays: Sequence[float] = (), *, half_lives: Sequence[float] = (), warmup: bool = True) -> None:
        decays, half_lives = list(decays or ()), list(half_lives or ())
        self._check(decays, half_lives)
        self.warmup = warmup
        self.decays = {f"ema{decay:g}": decay for decay in decays}
        self.half_lives = {f"ema_{_short(half_life)}img": half_life for half_life in half_lives}
        self.averages: dict[str, dict[str, Tensor]] = {}
        self._values: list[Tensor] = []
        self._last_step = self._last_images = 0

    @staticmethod
    def _check(decays: list[float], half_lives: list[float]) -> None:
        if not all(0 <= decay < 1 for decay in decays) or len(set(decays)) != len(decays):
            raise ValueError(
                f"decays must be different numbers in [0, 1), got {decays}; change callbacks.weight_ema.decays"
            )
        if not all(half_life > 0 for half_life in half_lives) or len({*map(_short, half_lives)}) != len(half_lives):
            raise ValueError(
                "half_lives must be different positive numbers of images, "
                f"got {half_lives}; change callbacks.weight_ema.half_lives"
            )
        if not decays and not half_lives:
            raise ValueError(
                "no average was asked for: give callbacks.weight_ema.decays or half_lives, or callbacks.weight_ema=null"
            )

    @property
    def names(self) -> list[str]:
        """Names of the averages, e.g. `ema0.999` and `ema_500kimg`: files and logs carry them."""
        return [*self.decays, *self.half_lives]

    def on_fit_start(self, trainer: L.Trainer, pl_module: Method) -> None:
        """Start from the online weights, or move restored averages to the device."""
        self._last_step, self._last_images = pl_module.progress.step, pl_module.progress.images_seen
        parameters = dict(pl_module.denoiser.named_parameters())
        for name in self.names:
            if name not in self.averages:
                if self._last_step > 0:
                    raise ValueError(
                        f"the checkpoint holds no average {name} (it has {sorted(self.averages)}); set "
                        "callbacks.weight_ema.decays and half_lives to those, or start another run with run_name="
                    )
                self.averages[name] = {key: value.detach().clone() for key, value in parameters.items()}
            self.averages[name] = {
                key: torch.empty_like(parameters[key], requires_grad=False).copy_(value)  # its device and memory order
                for key, value in self.averages[name].items()
            }
        self._values = list(parameters.values())  # finding them takes longer than averaging them

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Method, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update every average if an optimizer step happened."""
        step = pl_module.progress.step
        if step == self._last_step:
            return
        seen, reached_step = pl_module.progress.images_seen, pl_module.progress.schedule_step
        ratio = pl_module.progress.batch_ratio
        images, self._last_step, self._last_images = seen - self._last_images, step, seen
        values = self._values
        for name, decay in self.decays.items():
            rate = decay**ratio
            beta = min(rate, reached_step / (9 + reached_step)) if self.warmup else rate
            ema_update_(self.averages[name].values(), values, beta)
        for name, half_life in self.half_lives.items():
            # EDM counts the images *before* this step: its first step copies the weights.
            reached = RAMP_UP * (seen - images) if self.warmup else half_life
            beta = 0.5 ** (images / max(min(half_life, reached), 1e-8))
            ema_update_(self.averages[name].values(), values, beta)

    @contextmanager
    def applied(self, pl_module: Method, name: str | None = None) -> Iterator[str]:
        """Within the context the denoiser holds an average (the first by default); yields its name."""
        name = name or self.names[0]
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


@contextmanager
def weights_to_sample(trainer: L.Trainer, method: Method) -> Iterator[str]:
    """Within the context the denoiser is in eval mode and holds the weights that are sampled; yields their name.

    They are the first average of `WeightEMA`, or the raw weights where there is none.
    """
    average = find_callback(trainer, WeightEMA)
    with eval_mode(method.denoiser), average.applied(method) if average else nullcontext("raw") as name:
        yield name


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Within the context the module is in eval mode."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def _short(images: float) -> str:
    """500000 -> 500k, 25e6 -> 25M."""
    return f"{images / 1e6:g}M" if images >= 1e6 else f"{images / 1e3:g}k"


@torch.no_grad()
def _copy_into(parameters: dict[str, Any], values: dict[str, Tensor]) -> None:
    for key, parameter in parameters.items():
        parameter.copy_(values[key])
