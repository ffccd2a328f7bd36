"""`consistency-train estimate=true`: memory, speed and hours of a recipe from a short probe that writes nothing."""

from __future__ import annotations

import logging
import resource
import statistics
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from consistency.commands.build import build_data, build_method, build_parts, build_trainer, fit_quietly
from consistency.methods.base import Method
from consistency.models.flops import flops_of_image
from consistency.training.averaging import TargetEMA, WeightEMA
from consistency.training.required import StepSeeds

log = logging.getLogger(__name__)

WARM_UP = 3  # steps that are not measured: libraries choose algorithms, torch.compile compiles


class Clock(Callback):
    """Seconds of each optimizer step after the warm-up; stops the training after so many steps or seconds."""

    def __init__(self, steps: int, seconds: float) -> None:
        self.steps, self.limit = steps, seconds
        self.seconds: list[float] = []
        self._calls, self._since = 0, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read the clock where an optimizer was called, its step skipped or not."""
        if trainer.global_step == self._calls:
            return
        self._calls = trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        if self._calls > WARM_UP:
            self.seconds.append(now - self._since)
        self._since = now
        enough = len(self.seconds) >= self.steps or (self.seconds and sum(self.seconds) >= self.limit)
        # Every rank must stop at the same step.
        if trainer.strategy.reduce_boolean_decision(bool(enough), all=False):
            trainer.should_stop = True


def estimate(cfg: DictConfig, *, steps: int = 20, seconds: float = 60.0) -> dict[str, float]:
    """Train for a few steps with the recipe's data, method, optimizer and averages, and say what the whole would take.

    Nothing is written, but a cache of the data set where there is none yet.

    Args:
        cfg: Of the run.
        steps: Steps to measure.
        seconds: Measure no longer than this.

    Returns:
        parameters, flops (of the whole run), peak_memory (bytes), images_per_second, hours.
    """
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data = build_data(cfg)
    method = build_method(cfg, data)
    averages = [part for part in build_parts(cfg.callbacks) if isinstance(part, TargetEMA | WeightEMA)]
    clock = Clock(steps, seconds)
    callbacks = [StepSeeds(cfg.seed), *averages, clock]
    trainer = build_trainer(cfg, callbacks, [], None)
    fit_quietly(trainer, method, data, None, tf32=cfg.tf32)
    return _tell(cfg, trainer, method, clock.seconds)


def _tell(cfg: DictConfig, trainer: L.Trainer, method: Method, seconds: list[float]) -> dict[str, float]:
    batch, steps = cfg.data.batch_size, cfg.trainer.max_steps
    typical = statistics.median(seconds)
    hours = steps * typical / 3600
    on_gpu = trainer.strategy.root_device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(trainer.strategy.root_device) if on_gpu else _peak_of_process()
    flops = flops_of_image(method.denoiser.config, method.network_passes)
    found = {
        "flops": flops * batch * steps,
        "parameters": sum(parameter.numel() for parameter in method.denoiser.parameters()),
        "peak_memory": peak,
        "images_per_second": batch / typical,
        "hours": hours,
    }
    if trainer.is_global_zero:
        devices, micro = trainer.world_size, batch // trainer.world_size // trainer.accumulate_grad_batches
        spread = f"{batch / max(seconds):.4g} to {batch / min(seconds):.4g}"
        log.info("parameters   %s", f"{found['parameters']:,}")
        where = "of a GPU, at most allocated" if on_gpu else "of this process, data and libraries included"
        log.info("peak memory  %.2f GB (%s)", peak / 1e9, where)
        log.info("images/s     %.4g (median of %d steps; %s)", found["images_per_second"], len(seconds), spread)
        parts = trainer.accumulate_grad_batches
        log.info("batch        %d = %d devices x %d micro-batches of %d", batch, devices, parts, micro)
        log.info("work         %.3g GFLOP an image, %.3g EFLOP in all", flops / 1e9, found["flops"] / 1e18)
        log.info("to the end   %.3g hours for %d steps, %.3g device-hours", hours, steps, hours * devices)
        log.info("not included: sample grids, evaluation, checkpoints, the start; nothing was trained or written")
    return found


def _peak_of_process() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
