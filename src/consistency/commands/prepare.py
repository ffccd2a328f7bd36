"""`consistency-data`: a data set made ready (cache), described, and looked at."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from consistency.data.arrays import histogram, mean_and_std
from consistency.data.cache import read_meta
from consistency.data.image_files import is_grid, save_grid
from consistency.data.module import ImageDataModule
from consistency.ops import derive_seed

log = logging.getLogger(__name__)

_ROWS, _COLUMNS = 20, 10  # one row a class up to so many classes
_SAMPLE = 2_000  # images that the statistics of a set without a cache come from


def prepare(cfg: DictConfig) -> ImageDataModule:
    """Make a data set, say what it is, and write a grid of its images."""
    if cfg.out is not None:
        _check_out(Path(cfg.out), cfg.data.dataset)
    data: ImageDataModule = instantiate(cfg.data, _convert_="object")
    data.setup("fit")
    dataset = data.dataset
    channels, size, _ = data.image_shape
    colour = "grey" if channels == 1 else "colour"
    log.info("images      %s, %dx%d, %d channel%s (%s)", f"{len(dataset):,}", size, size, channels, "s"[: channels - 1],
             colour)  # fmt: skip
    labels = torch.as_tensor(dataset.labels)
    _say_classes(labels, dataset.classes, data.num_classes)
    _say_pixels(dataset)
    _say_cache(dataset)
    if cfg.out is not None:
        picture, columns = _grid(dataset, labels, cfg.seed)
        save_grid(picture, Path(cfg.out), columns)
        log.info("grid        %s", cfg.out)
    return data


def _check_out(out: Path, dataset: DictConfig) -> None:
    """Nothing of the user's is replaced, and the grid does not become an image of the set."""
    for option in ("path", "root", "name"):
        folder = dataset.get(option)
        folder = Path(str(folder)) if folder else None
        if folder is not None and folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            what = f"lies in data.dataset.{option}={folder}, among the data"
            raise ValueError(f"out={out} {what}; set out to a file elsewhere, or out=null for no grid")
    if out.exists() and not is_grid(out):
        raise ValueError(f"out={out} exists and is no grid of ours; set out to a new file, or out=null for no grid")


def _say_classes(labels: Tensor, names: Sequence[str], num_classes: int) -> None:
    counts = torch.bincount(labels, minlength=len(names))
    if len(counts) < 2:
        log.info("classes     none; data.num_classes=0")
        return
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    log.info("classes     %d: %s", len(counts), shown)
    log.info("            %d to %d images each", counts.min(), counts.max())
    if num_classes == 0:
        log.info("            not used; data.num_classes=%d to use them", len(counts))


def _say_pixels(dataset: Any) -> None:
    """Mean and standard deviation: of all images where they are at hand, of some where each must be decoded."""
    note = ""
    folder = getattr(dataset, "folder", None)
    if folder is not None:
        meta = read_meta(folder)
        mean, std = meta["mean"], meta["std"]
    elif isinstance(getattr(dataset, "images", None), Tensor):
        mean, std = mean_and_std([histogram(dataset.images)])
    else:
        generator = torch.Generator().manual_seed(0)
        some = torch.randperm(len(dataset), generator=generator)[:_SAMPLE].sort().values.tolist()
        mean, std = mean_and_std(histogram(dataset[index][0][None]) for index in some)
        note = f" (of {len(some):,} images)" if len(some) < len(dataset) else ""
    log.info("mean        %s in [0, 1]%s", _numbers(mean), note)
    log.info("std         %s in [0, 1]", _numbers(std))
    log.info("sigma_data  %.3f in [-1, 1]; data.sigma_data", 2 * (sum(s**2 for s in std) / len(std)) ** 0.5)


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _say_cache(dataset: Any) -> None:
    if not isinstance(getattr(dataset, "images", None), Tensor):
        log.info("cache       none: images are decoded on the fly; use data.num_workers")
        return
    folder, size = getattr(dataset, "folder", None), dataset.images.nbytes / 1e6
    if folder is None:
        digest = hashlib.sha256(dataset.images.contiguous().numpy().data).hexdigest()
    else:
        digest = read_meta(folder)["sha256"]["images"]
    log.info("cache       %s, %.1f MB", folder or "none needed: in memory", size)
    log.info("sha256      %s", digest)


def _grid(dataset: Any, labels: Tensor, seed: int) -> tuple[Tensor, int]:
    """Random images uint8 [M, C, H, W] and how many make a row: a row a class, or a square of any."""
    generator = torch.Generator().manual_seed(derive_seed("grid", seed))
    order = torch.randperm(len(labels), generator=generator)
    num_classes = int(labels.max()) + 1
    if not 1 < num_classes <= _ROWS:
        count = min(len(labels), _COLUMNS**2)
        return torch.stack([dataset[int(index)][0] for index in order[:count]]), min(count, _COLUMNS)
    white = torch.full_like(dataset[0][0], 255)
    rows = []
    for label in range(num_classes):
        some = [dataset[int(index)][0] for index in order[labels[order] == label][:_COLUMNS]]
        rows += some + [white] * (_COLUMNS - len(some))
    return torch.stack(rows), _COLUMNS
