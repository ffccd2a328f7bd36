"""Micro-batches that fit into memory: found by a probe before training."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader

from consistency.data.module import ImageDataModule
from consistency.methods.base import Method

log = logging.getLogger(__name__)

# What training holds beside the forward and backward pass, in units of the trained weights: two moments of Adam, and
# the buffers of DDP or the temporary tensors of the optimizer. Target and averages are in memory when the probe runs.
RESERVE = 3


class AutoAccumulate(Callback):
    """`trainer.accumulate_grad_batches=auto`: as few micro-batches a step as fit into memory; the batch stays.

    Training starts with one micro-batch, and more are tried until one forward and backward pass fits on every rank. A
    resumed run keeps what it began with, because random numbers of a step belong to its micro-batches. To come before
    the checkpoint's callback and after those that hold averages. For one device and DDP.
    """

    def __init__(self) -> None:
        self._is_resumed = False

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Method, checkpoint: dict[str, Any]) -> None:
        """Keep the number of the earlier session."""
        before = checkpoint.get("consistency", {}).get("accumulate_grad_batches")
        if before is not None:
            trainer.accumulate_grad_batches, self._is_resumed = before, True

    def on_fit_start(self, trainer: L.Trainer, pl_module: Method) -> None:
        """Set `trainer.accumulate_grad_batches`.

        Raises:
            ValueError: if not even one image fits, or the weights are sharded.
        """
        if self._is_resumed:
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                "trainer.accumulate_grad_batches=auto works on one device and with strategy=ddp; give a number"
            )
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        of_rank = data.batch_size // trainer.world_size
        parts = 0
        for candidate in range(1, of_rank + 1):
            # 1, 2, 4, ..., where the batch of a rank can be divided so, and single images at the end.
            if of_rank % candidate or (candidate < 2 * parts and candidate != of_rank):
                continue
            parts = candidate
            if trainer.strategy.reduce_boolean_decision(probe_memory(trainer, pl_module, parts), all=True):
                trainer.accumulate_grad_batches = parts
                size = of_rank // parts
                log.info("trainer.accumulate_grad_batches=auto is %d: micro-batches of %d images", parts, size)
                return
        raise ValueError("out of memory with a single image a device; choose a smaller network or precision=bf16")


def probe_memory(trainer: L.Trainer, method: Method, parts: int) -> bool:
    """Whether a forward and backward pass fits with so many micro-batches a step, on this rank; leaves no trace.

    It is the training step of the method itself on real images, with `RESERVE` times the weights set aside.
    """
    device, progress = method.device, method.progress
    before = trainer.accumulate_grad_batches, progress.pending
    buffers = {name: buffer.clone() for name, buffer in method.named_buffers()}
    is_enough = True
    try:
        trainer.accumulate_grad_batches = parts
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            _forward_and_backward(trainer, method)
    except torch.OutOfMemoryError:
        is_enough = False
    finally:
        trainer.accumulate_grad_batches, progress.pending = before
    # The traceback, which held the activations, is gone only here.
    gc.collect()
    torch.cuda.empty_cache()
    with torch.no_grad():
        for name, buffer in method.named_buffers():
            buffer.copy_(buffers[name])
    return is_enough


def _forward_and_backward(trainer: L.Trainer, method: Method) -> None:
    loader: Any = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
    plain = DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn)  # no workers
    batch = trainer.strategy.batch_to_device(next(iter(plain)), dataloader_idx=0)
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    reserve = RESERVE * sum(parameter.nbytes for parameter in parameters)
    reserved = torch.empty(reserve, dtype=torch.uint8, device=method.device)
    with trainer.precision_plugin.train_step_context():
        loss = method.training_step(batch, 0)["loss"]
    # Not `backward`: it would add to gradients, and wake DDP.
    torch.autograd.grad(loss, parameters, allow_unused=True)
    del reserved


def fit(trainer: L.Trainer, method: Method, data: ImageDataModule, checkpoint: Path | None) -> None:
    """`trainer.fit`; when memory runs out, one line says what to change.

    Raises:
        ValueError: instead of torch.OutOfMemoryError.
    """
    try:
        trainer.fit(method, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except torch.OutOfMemoryError as error:
        size = data.batch_size // trainer.world_size // trainer.accumulate_grad_batches
        raise ValueError(
            f"out of memory with micro-batches of {size} images ({str(error).splitlines()[0][:200]}); set "
            f"trainer.accumulate_grad_batches=auto (data.batch_size={data.batch_size} stays); if it was sampling or "
            "evaluation, lower callbacks.sample_grid.num_samples or the batch_size of evaluation"
        ) from None
