"""What goes wrong without an error: gradients that are not finite, and a model that draws one image for all noise."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from consistency.data.module import ShuffledBatches
from consistency.io.atomic import write_text
from consistency.methods.base import Method
from consistency.models.denoiser import Denoiser
from consistency.ops import send
from consistency.training.averaging import eval_mode

log = logging.getLogger(__name__)

MOST_NORMS = 50  # gradient norms in a repro file


class NonFinite(Callback):
    """Do not apply a step whose gradient holds a nan or an inf; stop after `patience` of them in a row.

    Such a step leaves weights and moments as they are, and advances neither averages nor target nor curriculum; its
    images count as seen. The check comes after accumulation and the mean over ranks, before clipping, on unscaled
    gradients. Under fp16 it is the scaler that skips; a few steps at the start of a run, while it looks for its scale,
    are normal. Skipped steps are counted in the column `nonfinite_steps`.

    To know whether to apply a step, the CPU must wait for the gradient. Without `wait` it does not: entries that are
    not finite become 0 on the device (EDM's training loop does so), the step is applied and counts, and how many there
    were is read when a row of `TrainingLog` is due.

    Args:
        dirpath: Where `nonfinite_rank0.json` is written when the run stops: what is needed to make the step again.
        patience: Steps in a row.
        wait: Whether each step waits for the device, and is skipped; False for CUDA without a stop in the hot loop.
    """

    def __init__(self, dirpath: str, patience: int = 20, *, wait: bool = True) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}; change callbacks.nonfinite.patience")
        self.dirpath, self.patience, self.wait = Path(dirpath), patience, wait
        self._on_device: Tensor | None = None  # count and in_a_row, where nobody waits
        self.count = self.in_a_row = 0
        self._parts: list[dict[str, Any]] = []  # micro-batches of the step under way
        self._has_stepped = False
        self._norms: dict[str, float] | None = None

    def columns(self, pl_module: Method) -> dict[str, float]:
        """For the row of `TrainingLog`."""
        if self._on_device is not None:
            before = self.count
            self.count, self.in_a_row = self._on_device.tolist()
            if self.count > before and pl_module.trainer.is_global_zero:
                done = "the scaler skipped them" if _scaler_of(pl_module.trainer) else "such entries were taken as 0"
                what = "gradients were not finite in %d steps up to step %d (%d so far); %s"
                log.warning(what, self.count - before, pl_module.progress.step, self.count, done)
        return {"nonfinite_steps": self.count}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Method, batch: Any, batch_idx: int) -> None:
        """Note where the micro-batch stands in the data."""
        if self._has_stepped:
            self._parts, self._has_stepped = [], False
        progress = pl_module.progress
        self._parts.append({"position": progress.images_seen + progress.pending})

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Method, optimizer: Any) -> None:
        """Look at the gradient, count, and take it away where it is not finite."""
        self._has_stepped = True
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # Of the largest entries, as the scaler looks: squares of finite float32 numbers may overflow.
        gradients = [p.grad for p in parameters if p.grad is not None]
        all_finite = torch.nn.utils.get_total_norm(gradients, torch.inf).isfinite()
        if not self.wait:
            self._set_to_zero(trainer, pl_module, gradients, ~all_finite)
            return
        is_finite = bool(all_finite)  # the one place where a step waits for the device
        if not trainer.strategy.reduce_boolean_decision(not is_finite, all=False):  # all ranks take the same branch
            self.in_a_row = 0
            return
        self.count, self.in_a_row = self.count + 1, self.in_a_row + 1
        if self.count & (self.count - 1) == 0 and trainer.is_global_zero:  # 1, 2, 4, 8, ...
            what = "the gradient of step %d is not finite, the step was not applied (%d so far, %d in a row)"
            log.warning(what, pl_module.progress.step + 1, self.count, self.in_a_row)
        if self.in_a_row >= self.patience:
            self._norms = _norms(pl_module)
        if _scaler_of(trainer) is None:
            for parameter in parameters:
                parameter.grad = None  # what has no gradient is left alone by every optimizer, its moments too

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Method, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop where it has lasted too long."""
        self._parts[-1] |= {"sigma": outputs["sigma"], "per_sample": outputs["per_sample"]}
        if self._norms is not None:
            file = self._write_repro(trainer, pl_module, self._norms)
            raise FloatingPointError(
                f"the gradient was not finite in {self.in_a_row} steps in a row, training stopped at step "
                f"{pl_module.progress.step}; {file} says what to repeat, lower optimizer.lr or use precision=fp32"
            )

    def _set_to_zero(self, trainer: L.Trainer, pl_module: Method, gradients: list[Tensor], is_bad: Tensor) -> None:
        """Count on the device and mend; stop at a row if it has lasted too long. The scaler skips by itself."""
        if self._on_device is None:
            self._on_device = send(torch.tensor([self.count, self.in_a_row]), is_bad.device)
        count, in_a_row = self._on_device
        self._on_device = torch.stack([count + is_bad, (in_a_row + 1) * is_bad])
        if self.in_a_row >= self.patience:  # as the last row found it; this step may have ended it
            self.in_a_row = int(self._on_device[1])
            self._norms = _norms(pl_module) if self.in_a_row >= self.patience else None
        if _scaler_of(trainer) is None:
            for gradient in gradients:
                torch.nan_to_num_(gradient, nan=0.0, posinf=0.0, neginf=0.0)

    def _write_repro(self, trainer: L.Trainer, pl_module: Method, norms: dict[str, float]) -> Path:
        """One JSON file a rank; numbers that are not finite are strings in it."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        worst_first = sorted(norms, key=lambda name: (math.isfinite(norms[name]), -norms[name]))
        repro = {
            "step": pl_module.progress.step,
            "images_seen": pl_module.progress.images_seen,
            "seed": getattr(data, "seed", None),
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "micro_batches": [self._describe(part, data, trainer) for part in self._parts],
            "gradient_norms": {name: norms[name] for name in worst_first[:MOST_NORMS]},
        }
        file = self.dirpath / f"nonfinite_rank{trainer.global_rank}.json"
        self.dirpath.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(_plain(repro), indent=1) + "\n")
        return file

    @staticmethod
    def _describe(part: dict[str, Any], data: Any, trainer: L.Trainer) -> dict[str, Any]:
        levels, losses = part["sigma"].tolist(), part["per_sample"].tolist()
        described = {"position": part["position"], "sigma": levels, "loss": losses}
        if data is not None:
            batches = ShuffledBatches(
                len(data.dataset),
                len(levels),
                seed=data.seed,
                start=lambda: part["position"],
                rank=trainer.global_rank,
                world_size=trainer.world_size,
            )
            described["indices"] = next(iter(batches))
        return described

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        count, in_a_row = (self.count, self.in_a_row) if self._on_device is None else self._on_device.tolist()
        return {"count": count, "in_a_row": in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore them."""
        self.count, self.in_a_row, self._on_device = state_dict["count"], state_dict["in_a_row"], None


def _scaler_of(trainer: L.Trainer) -> Any:
    """The loss scaler of fp16, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _norms(pl_module: Method) -> dict[str, float]:
    """Norm of the gradient of each parameter."""
    with_gradient = ((name, p.grad) for name, p in pl_module.named_parameters() if p.grad is not None)
    return {name: gradient.norm().item() for name, gradient in with_gradient}


def _plain(tree: Any) -> Any:
    """JSON knows neither nan nor inf: "nan", "inf"."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_plain(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


class Collapse(Callback):
    """Warn when the model gives (almost) one image for all noise: the variance of f(x, sigma_max) falls away.

    Measured over a fixed batch of noise under one label, in each row of `TrainingLog`, column `output_variance`: the
    variance over the batch, mean over pixels. A run begins with an output near zero, so that a small value says
    nothing; a fall below 1 % of the largest so far does. Not for EDM: its D(x; sigma_max) is near the data's mean.

    Args:
        num_images: Size of the batch; it costs a forward pass of so many images a row.
    """

    FALL = 0.01

    def __init__(self, num_images: int = 16) -> None:
        if num_images < 2:
            raise ValueError(f"num_images must be at least 2, got {num_images}; change callbacks.collapse.num_images")
        self.num_images = num_images
        self.largest, self.falls, self.is_fallen = 0.0, 0, False

    def columns(self, pl_module: Method) -> dict[str, float]:
        """For the row of `TrainingLog`: measure, and warn once a fall."""
        if pl_module.kind == "diffusion":
            return {}
        variance = self.measure(pl_module.denoiser)
        if math.isfinite(variance):
            self.largest = max(self.largest, variance)
            fallen = variance < self.FALL * self.largest
            if fallen and not self.is_fallen:
                self.falls += 1
                if pl_module.trainer.is_global_zero:
                    what = "the samples have collapsed at step %d: their variance is %.3g, it was %.3g; %s"
                    advice = "lower optimizer.lr, or start again from an earlier model (init_from)"
                    log.warning(what, pl_module.progress.step, variance, self.largest, advice)
            self.is_fallen = fallen
        return {"output_variance": variance}

    @torch.no_grad()
    def measure(self, denoiser: Denoiser) -> float:
        """Variance over the batch, mean over pixels; draws from a generator of its own."""
        device = next(denoiser.parameters()).device
        noise = torch.randn(self.num_images, *denoiser.image_shape, generator=torch.Generator().manual_seed(0))
        x = (denoiser.sigma_max * noise).to(device)
        sigma = x.new_full((self.num_images,), denoiser.sigma_max)
        labels = torch.zeros(self.num_images, dtype=torch.int64, device=device)
        parts = zip(*(tensor.split(4) for tensor in (x, sigma, labels)), strict=True)  # fits where training does
        with eval_mode(denoiser):
            images = torch.cat([denoiser(*part) for part in parts])
        return images.var(dim=0).mean().item()

    def state_dict(self) -> dict[str, Any]:
        """The largest variance so far, and the falls."""
        return {"largest": self.largest, "falls": self.falls, "is_fallen": self.is_fallen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self.largest, self.falls, self.is_fallen = (state_dict[key] for key in ("largest", "falls", "is_fallen"))
