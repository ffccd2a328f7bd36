"""Micro-batches that fit into memory: found by a probe, before training or after it has run out."""

from __future__ import annotations

import gc
import logging
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader

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
        self._is_known = False

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the number of the earlier session."""
        before = checkpoint.get("consistency", {}).get("accumulate_grad_batches")
        if before is not None:
            trainer.accumulate_grad_batches, self._is_known = before, True

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Set `trainer.accumulate_grad_batches`.

        Raises:
            ValueError: if not even one image fits, or the weights are sharded.
        """
        if self._is_known:
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                "trainer.accumulate_grad_batches=auto works on one device and with strategy=ddp; give a number"
            )
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for parts in _divisions(data.batch_size, trainer.world_size):
            if trainer.strategy.reduce_boolean_decision(fits(trainer, pl_module, parts), all=True):
                trainer.accumulate_grad_batches = parts
                size = data.batch_size // trainer.world_size // parts
                log.info("trainer.accumulate_grad_batches=auto is %d: micro-batches of %d images", parts, size)
                return
        raise ValueError("out of memory with a single image a device; choose a smaller network or precision=bf16")


def _divisions(batch_size: int, world_size: int) -> list[int]:
    """Numbers of micro-batches to try: 1, 2, 4, ..., where the batch of a rank can be divided so."""
    of_rank = batch_size // world_size
    parts: list[int] = []
    for candidate in range(1, of_rank + 1):
        if batch_size % (world_size * candidate) == 0 and (not parts or candidate >= 2 * parts[-1]):
            parts.append(candidate)
    return parts if not parts or parts[-1] == of_rank else [*parts, of_rank]


def fits(trainer: L.Trainer, pl_module: Any, parts: int) -> bool:
    """Whether a forward and backward pass fits with so many micro-batches a step, on this rank; leaves no trace.

    It is the training step of the method itself on real images, with `RESERVE` times the weights set aside.
    """
    device, progress = pl_module.device, pl_module.progress
    before = trainer.accumulate_grad_batches, progress.pending
    buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
    is_enough = True
    try:
        trainer.accumulate_grad_batches = parts
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            _pass(trainer, pl_module)
    except torch.OutOfMemoryError:
        is_enough = False
    finally:
        trainer.accumulate_grad_batches, progress.pending = before
    # The traceback, which held the activations, is gone only here.
    gc.collect()
    torch.cuda.empty_cache()
    with torch.no_grad():
        for name, buffer in pl_module.named_buffers():
            buffer.copy_(buffers[name])
    return is_enough


def _pass(trainer: L.Trainer, pl_module: Any) -> None:
    loader: Any = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
    plain = DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn)  # no workers
    batch = trainer.strategy.batch_to_device(next(iter(plain)), dataloader_idx=0)
    parameters = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
    reserve = RESERVE * sum(parameter.nbytes for parameter in parameters)
    reserved = torch.empty(reserve, dtype=torch.uint8, device=pl_module.device)
    with trainer.precision_plugin.train_step_context():
        loss = pl_module.training_step(batch, 0)["loss"]
    # Not `backward`: it would add to gradients, and wake DDP.
    torch.autograd.grad(loss, parameters, allow_unused=True)
    del reserved


def fit(trainer: L.Trainer, method: Any, data: Any, checkpoint: Any) -> None:
    """`trainer.fit`; when memory runs out, one line says which micro-batch would fit.

    Raises:
        ValueError: instead of torch.OutOfMemoryError.
    """
    try:
        trainer.fit(method, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return
    except torch.OutOfMemoryError as error:
        what = str(error).splitlines()[0][:200]
    # Out of the except block the traceback is gone, and with it the activations.
    raise ValueError(_advice(trainer, method, data, what))


def _advice(trainer: L.Trainer, method: Any, data: Any, what: str) -> str:
    """What to change. Lightning has moved the weights to the CPU by now."""
    method.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    tried, ranks = trainer.accumulate_grad_batches, trainer.world_size
    size = data.batch_size // ranks // tried
    start = f"out of memory with micro-batches of {size} images ({what})"
    divisions = [parts for parts in _divisions(data.batch_size, ranks) if parts >= tried]
    try:
        method.to(trainer.strategy.root_device)
        enough = next((parts for parts in divisions if fits(trainer, method, parts)), None)
    except torch.OutOfMemoryError:
        enough = None
    if enough is None:
        return f"{start}, and not even one image fits; choose a smaller network or precision=bf16"
    if enough == tried:
        return (
            f"{start}, though a training step of its own fits: another program is on the device, or it was sampling or "
            "evaluation; lower callbacks.sample_grid.num_samples or the batch_size of evaluation"
        )
    auto = "=auto and compile=true" if method.denoiser.in_graphs else "=auto"
    return (
        f"{start}, {data.batch_size // ranks // enough} fit; set trainer.accumulate_grad_batches={enough} or {auto} "
        f"(data.batch_size={data.batch_size} stays), or a smaller data.batch_size"
    )
