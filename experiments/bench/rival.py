"""A training step next to that of diffusers' UNet2DModel with the same weights: same layers, size and FLOPs.

Both do denoising score matching on one batch: noise, forward, mean squared error, backward, AdamW, an average of the
weights. Theirs as its users run it: float32, eager, `EMAModel`; ours plain, and with speed=cpu or speed=gpu. Beside it
the network alone, forward and backward, at equal precision and with the same help from the compiler.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import in_turns, ratio, spread
from torch import Tensor, nn

from consistency.models.averages import ema_update_
from consistency.models.denoiser import Denoiser
from consistency.models.execution import configure_execution
from consistency.models.parametrization import EDM
from consistency.models.unet import UNet
from consistency.noise.grids import SIGMA_MIN

DIFFUSERS, PLAIN = "diffusers, float32, eager", "ours, float32, eager"


def same_networks(config: dict[str, Any], device: torch.device) -> tuple[Denoiser, nn.Module]:
    """Our denoiser in ADM's layout, of the size of a recipe's network, and diffusers' UNet2DModel with its weights."""
    from diffusers import UNet2DModel

    from consistency.checkpoints.diffusers import save_pipeline

    kept = ("image_size", "in_channels", "channels", "channel_mult", "num_blocks", "attention_resolutions")
    adm = {"adm": True, "scale_shift": True, "skip_scale": 1.0, "norm_eps": 1e-5, "norm_groups": 32}
    heads = min(64, int(config["channels"]))
    torch.manual_seed(0)
    network = UNet(**{name: config[name] for name in kept}, head_channels=heads, **adm)
    denoiser = Denoiser(network, EDM(boundary=SIGMA_MIN, noise_scale=250.0))  # what diffusers' pipeline can hold
    with torch.no_grad():
        for parameter in denoiser.parameters():  # zeros would let parts of the network sleep
            parameter.add_(0.02 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        theirs = UNet2DModel.from_pretrained(save_pipeline(denoiser, Path(folder) / "pipeline") / "unet")
    return denoiser.to(device).train(), theirs.to(device).train()


def our_step(
    denoiser: Denoiser, images: Tensor, noise: Tensor, *, dtype: torch.dtype | None = None, foreach: bool | None = None
) -> Any:
    """A step of ours on the raw network; `dtype` is that of autocast, `foreach` the option of speed=cpu."""
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4, foreach=foreach)
    averages = [parameter.detach().clone() for parameter in denoiser.parameters()]
    network = denoiser.network
    c_noise = images.new_zeros(len(images))

    def step() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            out = network(images + noise, c_noise)
        (out.float() - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema_update_(averages, network.parameters(), 0.999)

    return step


def their_step(network: Any, images: Tensor, noise: Tensor) -> Any:
    """The same step with diffusers' network and average."""
    from diffusers.training_utils import EMAModel

    optimizer, average = torch.optim.AdamW(network.parameters(), lr=1e-4), EMAModel(network.parameters(), decay=0.999)
    c_noise = images.new_zeros(len(images))

    def step() -> None:
        out = network(images + noise, c_noise).sample
        (out - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    return step


def network_alone(run: Callable[[], Tensor], parameters: list[nn.Parameter]) -> Callable[[], None]:
    """Forward and backward, without optimizer and average."""

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        run().float().square().mean().backward()

    return step


def measure(
    config: dict[str, Any], device: torch.device, *, batch: int, rounds: int = 9, compiled: bool = True
) -> dict[str, Any]:
    """Seconds of each side and how many times as fast ours are, over interleaved pairs.

    Args:
        config: Of the recipe's network.
        device: Where.
        batch: Images of a step.
        rounds: Pairs.
        compiled: Whether to include torch.compile; it takes a minute first.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = same_networks(config, device)
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(batch, *ours.image_shape, generator=generator).to(device) for _ in range(2))
    zeros = images.new_zeros(batch)
    with torch.no_grad():
        difference = (ours.network(images, zeros) - theirs(images, zeros).sample).abs().max().item()
    half = torch.bfloat16 if device.type == "cuda" else None
    make = partial(our_step, images=images, noise=noise)
    sides: dict[str, Callable[[], Any]] = {DIFFUSERS: their_step(theirs, images, noise)}
    sides[PLAIN] = make(copy.deepcopy(ours))
    cl, compiles = copy.deepcopy(ours), {"channels_last": True, "compile": True}
    configure_execution(cl, channels_last=True)
    sides["ours, channels_last"] = make(cl)
    alone: dict[str, Callable[[], Tensor]] = {
        "diffusers, network alone": lambda: theirs(images, zeros).sample,
        "ours, network alone": lambda: ours.network(images, zeros),
    }
    if compiled:
        fast, rival = copy.deepcopy(ours), copy.deepcopy(theirs)
        configure_execution(fast, **compiles)
        sides["ours, speed=gpu (bf16)" if half else "ours, speed=cpu"] = make(
            fast, dtype=half, foreach=not half or None
        )
        rival.compile()
        alone["diffusers, network alone, compiled"] = lambda: rival(images, zeros).sample
        alone["ours, network alone, compiled"] = lambda: fast.network(images, zeros)
    owners = {"ours": ours, "diff": theirs}
    for name, run in alone.items():
        owner = (fast if "ours" in name else rival) if "compiled" in name else owners[name[:4]]
        sides[name] = network_alone(run, list(owner.parameters()))
    seconds = in_turns(sides, device, rounds=rounds)
    return {
        "parameters": sum(parameter.numel() for parameter in theirs.parameters()),
        "batch": batch,
        "largest_difference": difference,
        "step": {name: spread(values) for name, values in seconds.items()},
        "times_as_fast": {
            name: ratio(seconds[_rival_of(name)], seconds[name]) for name in sides if not name.startswith("diffusers")
        },
    }


def _rival_of(name: str) -> str:
    """What a side of ours is compared with."""
    return name.replace("ours", "diffusers") if "alone" in name else DIFFUSERS
