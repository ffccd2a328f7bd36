"""`consistency-edit`: zero-shot editing and composing with a trained model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from consistency.api import Model
from consistency.checkpoints.native import load_model
from consistency.commands.rundata import data_of
from consistency.commands.tasks import Columns
from consistency.data.arrays import DecodedImages
from consistency.data.cropping import adm
from consistency.data.image_files import image_grid, read_images, save_gif, save_png, save_pngs
from consistency.data.sources import ENDINGS, Files, OneFile
from consistency.io.atomic import write_text
from consistency.io.safe_load import read_npz

log = logging.getLogger(__name__)


def edit(cfg: DictConfig) -> Path:
    """Edit images; `out` gets a grid, single files and `edit.json`. Returns the folder."""
    out = Path(cfg.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out} exists and is not an empty folder; name a new one")
    denoiser, info = load_model(cfg.ckpt, cfg.weights)
    model = Model(denoiser, info, device=cfg.device, batch_size=cfg.batch_size)
    task: Callable[..., Columns] = instantiate(cfg.task, _convert_="object")
    draws_its_own = "num_images" in cfg.task and cfg.images is None and cfg.get("data") is None
    images, labels = (None, None) if draws_its_own else _images(cfg, model)
    given = OmegaConf.to_container(cfg.labels) if OmegaConf.is_config(cfg.labels) else cfg.labels
    columns = task(
        model,
        images,
        steps=cfg.steps,
        levels=None if cfg.sigmas is None else list(cfg.sigmas),
        seed=cfg.seed,
        labels=labels if given is None else given,
        guidance=float(cfg.guidance),
    )
    _write({name: column.images for name, column in columns.items()}, out, gif=cfg.gif)
    settings = {key: OmegaConf.to_container(cfg[key]) if OmegaConf.is_config(cfg[key]) else cfg[key] for key in cfg}
    said = {name: column._asdict() | {"images": len(column.images)} for name, column in columns.items()}
    write_text(
        out / "edit.json", json.dumps({"columns": said, "settings": settings, "model": _plain(info)}, indent=2) + "\n"
    )
    drawn = [column for column in columns.values() if column.levels]
    what = f"{len(drawn[0].images)} x {drawn[0].evaluations} evaluations at levels {_short(drawn[0].levels)}"
    others = f", and {len(drawn) - 1} more columns" if len(drawn) > 1 else ""
    log.info("%s: %s%s -> %s", getattr(task, "func", task).__name__, what, others, out)
    return out


def _images(cfg: DictConfig, model: Model) -> tuple[Tensor, Tensor | None]:
    """First `num_images` of a file, a folder, an `.npz` or a data set, as the model draws them, and their labels."""
    channels, size, _ = model.image_shape
    if cfg.images is None:
        data = data_of(cfg)
        if data is None:
            raise ValueError(
                f"ckpt={cfg.ckpt} does not say what it was trained on; give images=FILE_OR_FOLDER or data="
            )
        if data.image_shape != model.image_shape:
            raise ValueError(
                f"the data set has images {list(data.image_shape)}, the model draws {list(model.image_shape)}"
            )
        pairs = [data.dataset[index] for index in range(min(cfg.num_images, len(data.dataset)))]
        labels = torch.tensor([int(label) for _, label in pairs])
        # A set without labels has label 0 everywhere.
        return torch.stack([image for image, _ in pairs]), labels if data.num_classes == model.num_classes else None
    source = Path(cfg.images)
    if cfg.get("data") is not None:
        raise ValueError(f"images={source} and data= are given; leave one of them out")
    if source.suffix.lower() == ".npz":
        images = read_images(source)[: cfg.num_images]
        images = images.expand(-1, 3, -1, -1) if channels == 3 and images.shape[1] == 1 else images
        stored = read_npz(source, ["arr_1"]).get("arr_1") if model.num_classes else None
        return images, None if stored is None else torch.from_numpy(stored)[: len(images)]
    if source.is_file() and source.suffix.lower() not in ENDINGS:
        raise ValueError(f"images={source} is no image by its ending; allowed: {', '.join(ENDINGS)}, .npz, a folder")
    files = Files(source, labelled=False) if source.is_dir() else OneFile(source)
    factor = cfg.task.get("factor")
    if factor and files.open(0).size == (size // factor, size // factor):
        size //= factor  # small already
    decoded = DecodedImages(files, image_size=size, channels=channels, crop=adm)
    count = min(cfg.num_images, len(decoded))
    return torch.stack([torch.from_numpy(decoded.decode(index)) for index in range(count)]), None


def _write(columns: dict[str, Tensor], out: Path, *, gif: bool) -> None:
    """grid.png with a row an image and a column each, a folder of single files each, and an animation if asked for."""
    frames = list(columns.values())
    rows = torch.stack([frame.expand(-1, max(f.shape[1] for f in frames), -1, -1) for frame in frames], dim=1)
    out.mkdir(parents=True, exist_ok=True)
    save_png(image_grid(rows.flatten(0, 1), columns=len(frames)), out / "grid.png")
    for name, frame in columns.items():
        save_pngs(frame, out / name.replace(" ", "_").replace("(", "").replace(")", "").replace(",", ""))
    if gif:
        save_gif(frames, out / "strip.gif")


def _plain(info: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in info.items() if isinstance(value, str | int | float | bool) or value is None}


def _short(levels: list[float]) -> str:
    return ", ".join(f"{level:.3g}" for level in levels[:3]) + (", ..." if len(levels) > 3 else "")
