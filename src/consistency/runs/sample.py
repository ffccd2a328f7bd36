"""`consistency-sample`: a trained model in, images out. Needs no Lightning."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from consistency.checkpoints.io import load_model
from consistency.data.files import save_grid, save_npz, save_pngs
from consistency.sampling.images import draw_images, given_labels, labels_of_seed
from consistency.sampling.samplers import ConsistencySampler, OdeSampler

log = logging.getLogger(__name__)


def sample(cfg: DictConfig) -> Path:
    """Draw images from a trained model; returns what was written."""
    out, ending = Path(cfg.out), "" if cfg.out.endswith("/") else Path(cfg.out).suffix.lower()
    if ending not in (".png", ".npz", ""):
        raise ValueError(f"out={out} has the ending {ending}; use .png (a grid), .npz, or none (a folder of PNGs)")
    denoiser, info = load_model(cfg.ckpt, cfg.weights)
    sampler = instantiate(cfg.sampler, _convert_="object")
    check_sampler(sampler, info.get("method"), cfg.ckpt)
    device = find_device(cfg.device)
    denoiser = denoiser.to(device)
    images, labels = sample_images(
        denoiser, sampler, num_samples=cfg.num_samples, seed=cfg.seed, batch_size=cfg.batch_size, labels=cfg.labels
    )
    if ending == ".png":
        save_grid(images, out)
    elif ending == ".npz":
        save_npz(images, labels, out)
    else:
        save_pngs(images, out)
    log.info("%d images (%s, weights %s, seed %d) -> %s", len(images), info.get("method", "model"), info.get("weights"),
             cfg.seed, out)  # fmt: skip
    return out


def check_sampler(sampler: Any, method: str | None, ckpt: str) -> None:
    """Refuse what draws nonsense: one evaluation of a diffusion model, an ODE solver on a consistency model."""
    if method == "EDM" and isinstance(sampler, ConsistencySampler):
        allowed = "sampler=heun (or euler, dpm2, ancestral)"
        raise ValueError(f"{ckpt} is a diffusion model, which one or two evaluations cannot sample; use {allowed}")
    if method not in ("EDM", None) and isinstance(sampler, OdeSampler):
        allowed = "sampler=onestep or multistep"
        raise ValueError(f"{ckpt} is a consistency model ({method}), not a derivative of an ODE; use {allowed}")


def sample_images(
    denoiser: Any, sampler: Any, *, num_samples: int, seed: int, batch_size: int, labels: Any = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(uint8 [N, C, H, W], int64 [N] or None) on the CPU; image i is a function of (seed, i), not of the batch.

    Args:
        denoiser: A model, on its device.
        sampler: A `ConsistencySampler` or `OdeSampler`.
        num_samples: N.
        seed: Of all images.
        batch_size: Images at a time.
        labels: One label for all, a list that is repeated, or None for random labels by seed; conditional models only.
    """
    if labels is None:
        all_labels = labels_of_seed(seed, range(num_samples), denoiser.num_classes)
    else:
        all_labels = given_labels(labels, num_samples, denoiser.num_classes)
    batches = []
    for indices in torch.arange(num_samples).split(batch_size):
        batch_labels = None if all_labels is None else all_labels[indices]
        batches.append(draw_images(denoiser, sampler, indices.tolist(), seed=seed, labels=batch_labels).cpu())
    return torch.cat(batches), all_labels


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA, else MPS, else the CPU."""
    if name != "auto":
        try:
            return torch.zeros(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
