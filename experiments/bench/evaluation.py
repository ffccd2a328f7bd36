"""Sampling, features, and both together: how near evaluation comes to the speed of the slower of the two.

The extractor is torch-fidelity's Inception with random weights: time does not depend on them.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from timing import in_turns
from torch import Tensor, nn

from consistency.evaluation.extractors import Extractor, extract
from consistency.evaluation.measure import batches_of_rank
from consistency.evaluation.protocol import Evaluation
from consistency.models.denoiser import Denoiser
from consistency.models.parametrization import EDM
from consistency.models.unet import UNet
from consistency.noise.grids import SIGMA_MIN
from consistency.sampling.images import sample_images
from consistency.sampling.samplers import ConsistencySampler

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments/, for the network without its file
from benchmark_evaluation import random_inception

GPU_IMAGES, CPU_IMAGES = 20_000, 32
# The size of the photographs' network.
NETWORK = {"image_size": 32, "in_channels": 3, "channels": 64, "channel_mult": (2, 2, 2), "num_blocks": 3}


class RandomInception(Extractor):
    """Inception's features with weights that mean nothing."""

    name, prefix, dim, num_logits, digest = "random inception", "fid", 2048, 1008, "0" * 16

    def __init__(self) -> None:
        super().__init__()
        self.network: nn.Module = random_inception()
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, H, W] -> features [B, 2048], logits [B, 1008]."""
        features, logits = self.network(images)
        return features, logits


def measure(device: torch.device, images: int | None = None, batch: int | None = None) -> dict[str, Any]:
    """Images a second of one-step sampling alone, of the features alone, and of an evaluation of both.

    Args:
        device: Where.
        images: How many are drawn and measured; None for what takes less than a minute.
        batch: Images at a time.
    """
    on_gpu = device.type == "cuda"
    total, batch = images or (GPU_IMAGES if on_gpu else CPU_IMAGES), batch or (250 if on_gpu else 16)
    torch.manual_seed(0)
    network = UNet(**NETWORK)  # type: ignore[arg-type]
    denoiser = Denoiser(network, EDM(boundary=SIGMA_MIN)).to(device).eval()
    extractor, sampler = RandomInception().to(device), ConsistencySampler()
    # The Inception Score alone: a Frechet distance takes seconds once, however many images there are.
    protocol = Evaluation(
        lambda *_, **__: extractor, total, cache_dir="", batch_size=batch, metrics=("is",), allow_few=True
    )
    some = torch.randint(256, (batch, *denoiser.image_shape), dtype=torch.int64)
    uint8 = some.to(device, torch.uint8)

    def sample() -> None:
        for indices in batches_of_rank(total, batch):
            sample_images(denoiser, sampler, indices.tolist(), seed=0)

    def features() -> None:
        for indices in batches_of_rank(total, batch):
            extract(extractor, uint8[: len(indices)])

    sides = {"sampling": sample, "features": features, "both": lambda: _measured(protocol, denoiser)}
    seconds = in_turns(sides, device, rounds=5 if on_gpu else 1)
    rates = {name: total / statistics.median(spent) for name, spent in seconds.items()}
    slower = min(rates["sampling"], rates["features"])
    return {"images": total, "batch": batch, "images_per_second": rates, "share_of_the_slower": rates["both"] / slower}


def _measured(protocol: Evaluation, denoiser: Denoiser) -> None:
    nothing: Any = None  # of a reference: this score needs none
    extractor = protocol.make_extractor(None)
    protocol.measure_sampler(denoiser, ConsistencySampler(), extractor, nothing, seed=0)


def say(found: dict[str, Any]) -> str:
    """One line."""
    rates = ", ".join(f"{name} {rate:,.1f}" for name, rate in found["images_per_second"].items())
    return f"{rates} images/s; both at {100 * found['share_of_the_slower']:.0f} % of the slower of the two"
