"""How networks are run, not what they compute: torch.compile, memory format, precision of the raw network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from consistency.models.denoiser import Denoiser

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
GRAPHS = ("reduce-overhead", "max-autotune")  # modes of inductor that capture the network in CUDA graphs
MODES = (*GRAPHS, "max-autotune-no-cudagraphs")


def configure_execution(
    denoiser: Denoiser, *, compile: bool | str = False, channels_last: bool = False, precision: str = "fp32"
) -> None:
    """Set how the raw network of a denoiser is run, in place; with the defaults nothing changes, to the last bit.

    Names in state dicts stay as they are (`nn.Module.compile` is in place), so that compiled and eager runs continue
    each other's checkpoints, and copies are eager. Preconditioning stays eager, in float32.

    Args:
        denoiser: On the device where it will run.
        compile: True for PyTorch's default (inductor), a mode of inductor, or the name of another backend.
        channels_last: Weights and images as [B, H, W, C] in memory; convolutions then need no reordering.
        precision: fp32, bf16 or fp16: autocast around the raw network, for sampling; training has the trainer's.

    Raises:
        ValueError: if there is no such backend, mode or precision.
    """
    check_execution(next(denoiser.parameters()).device, compile=compile, precision=precision)
    denoiser.autocast_dtype = DTYPES[precision]
    if channels_last:
        denoiser.network.to(memory_format=torch.channels_last)
    if compile is False:
        return
    if compile in MODES:
        denoiser.network.compile(mode=compile)
        denoiser.in_graphs = compile in GRAPHS
    else:
        denoiser.network.compile(backend="inductor" if compile is True else compile)


def check_execution(device: torch.device, *, compile: bool | str = False, precision: str = "fp32") -> None:
    """Refuse what `configure_execution` would refuse on this device; costs nothing.

    Raises:
        ValueError: if there is no such backend, mode or precision.
    """
    if precision not in DTYPES:
        raise ValueError(f"dtype is {precision}; allowed: {', '.join(DTYPES)}")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("dtype is fp16 on a CPU; allowed there: fp32 or bf16")
    if compile is not True and compile is not False:
        known = (*MODES, *torch.compiler.list_backends(exclude_tags=()))
        if compile not in known:
            raise ValueError(f"compile is {compile}; allowed: true, false, {', '.join(known)}")


def begin_step(denoiser: Denoiser) -> None:
    """Tell CUDA graphs, where they are used, that the outputs of the step before are needed no longer."""
    if getattr(denoiser, "in_graphs", False):
        torch.compiler.cudagraph_mark_step_begin()


@contextmanager
def matmul_in_tf32(enabled: bool = True) -> Iterator[None]:
    """Within the context matrix products of float32 are taken in TF32 by GPUs that have it (convolutions always are).

    Args:
        enabled: False changes nothing.
    """
    before = torch.get_float32_matmul_precision()
    if enabled:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if enabled:
            torch.set_float32_matmul_precision(before)
