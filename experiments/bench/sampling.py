"""One-step sampling next to diffusers' ConsistencyModelPipeline with the same weights and the same noise.

Theirs without its progress bar and with `output_type="pt"`, so that it neither prints nor makes numpy or PIL images:
what is left beside the network is a scheduler's step. Both end in floats in [0, 1] on the device.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rival import same_networks
from timing import in_turns, ratio, spread
from torch import Tensor

from consistency.models.denoiser import Denoiser
from consistency.models.execution import configure_execution
from consistency.sampling.samplers import ConsistencySampler

DIFFUSERS = "diffusers, float32, eager"
Draw = Callable[[Tensor], Tensor]


def measure(
    config: dict[str, Any], device: torch.device, *, batch: int | None = None, rounds: int = 7, compiled: bool = False
) -> dict[str, Any]:
    """Milliseconds of a batch and of one image, and how many times as fast as diffusers each side of ours is.

    Args:
        config: Of the recipe's network, whose size is kept.
        device: Where.
        batch: Images at a time; None for 64 on a CPU, 256 on a GPU.
        rounds: Interleaved rounds.
        compiled: With torch.compile too, which takes a minute first.
    """
    batch = batch or (256 if device.type == "cuda" else 64)
    denoiser = same_networks(config, device)[0].eval()
    theirs = _pipeline(denoiser, device)
    sides = {DIFFUSERS: theirs, **_our_sides(denoiser, device, compiled=compiled)}
    noise = torch.randn(batch, *denoiser.image_shape, device=device, generator=torch.Generator(device).manual_seed(0))
    exact = [name for name in sides if "bf16" not in name]
    images = {name: sides[name](noise) for name in exact}
    seconds = in_turns({name: lambda draw=draw: draw(noise) for name, draw in sides.items()}, device, rounds=rounds)
    single = in_turns({name: lambda draw=draw: draw(noise[:1]) for name, draw in sides.items()}, device, rounds=rounds)
    return {
        "batch": batch,
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "step": {name: spread(times) for name, times in seconds.items()},
        "times_as_fast": {name: ratio(seconds[DIFFUSERS], seconds[name]) for name in sides if name != DIFFUSERS},
        "latency_ms": {name: spread(times) for name, times in single.items()},
        "largest_difference": max((image - images[DIFFUSERS]).abs().max().item() for image in images.values()),
    }


def _pipeline(denoiser: Denoiser, device: torch.device) -> Draw:
    """Theirs: noise -> images in [0, 1]."""
    from diffusers import ConsistencyModelPipeline

    from consistency.checkpoints.diffusers import save_pipeline

    with tempfile.TemporaryDirectory() as folder:
        pipeline = ConsistencyModelPipeline.from_pretrained(save_pipeline(denoiser, Path(folder) / "pipeline"))
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "output_type": "pt"}
    return lambda noise: pipeline(batch_size=len(noise), latents=noise, **options).images


def _our_sides(denoiser: Denoiser, device: torch.device, *, compiled: bool) -> dict[str, Draw]:
    """Ours, by how the network is run."""
    on_gpu = device.type == "cuda"
    ways: dict[str, dict[str, Any]] = {
        "ours, float32, eager": {},
        "ours, channels_last": {"channels_last": True},
    }
    if on_gpu:
        ways["ours, channels_last, bf16"] = {"channels_last": True, "precision": "bf16"}
    if compiled:
        backend = "reduce-overhead" if on_gpu else True
        ways |= {f"{name}, compiled": {**way, "compile": backend} for name, way in ways.items() if way}
    return {name: _ours(denoiser, way) for name, way in ways.items()}


def _ours(denoiser: Denoiser, way: dict[str, Any]) -> Draw:
    mine, sampler = copy.deepcopy(denoiser), ConsistencySampler()
    configure_execution(mine, **way)

    def draw(noise: Tensor) -> Tensor:
        return (sampler(mine, noise) / 2 + 0.5).clamp(0, 1)

    return draw
