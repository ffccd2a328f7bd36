"""torch.compile for the networks of a method, in place."""

from __future__ import annotations

from typing import Any

import torch

_HOLDERS = ("denoiser", "target", "teacher")


def compile_networks(method: Any, backend: bool | str) -> None:
    """Compile the raw networks of student, target and teacher; nothing happens for False.

    In place (`nn.Module.compile`): names in state dicts stay as they are, so that compiled and eager runs continue each
    other's checkpoints, and copies are eager. Preconditioning stays eager, in float32.

    Args:
        method: A LightningModule with a denoiser, and perhaps target and teacher.
        backend: True for PyTorch's default (inductor), or the name of a backend.

    Raises:
        ValueError: if there is no such backend.
    """
    if backend is False:
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if backend is not True and backend not in known:
        raise ValueError(f"compile is {backend}; allowed: true, false, {', '.join(known)}")
    for name in _HOLDERS:
        denoiser = getattr(method, name, None)
        if denoiser is not None:
            denoiser.network.compile(backend="inductor" if backend is True else backend)
