"""Images on disk: grids, single PNGs, and the `.npz` that the field's evaluators read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def image_grid(images: Tensor, columns: int | None = None, min_cell: int = 32) -> Tensor:
    """uint8 [N, C, H, W] -> one uint8 picture [3, H', W'], row by row; small images are enlarged by whole pixels.

    Args:
        images: The images.
        columns: Images in a row; None for a nearly square grid.
        min_cell: Smallest side of a cell, in pixels.
    """
    from torchvision.utils import make_grid

    columns = columns or int(np.ceil(len(images) ** 0.5))
    factor = -(-min_cell // images.shape[-1])
    images = images.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)
    return make_grid(images, nrow=columns, padding=2, pad_value=255)


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Write `image_grid` of uint8 images [N, C, H, W] as one PNG."""
    _write_png(image_grid(images, columns), path)


def save_pngs(images: Tensor, folder: Path) -> None:
    """Write uint8 images [N, C, H, W] as 00000.png, 00001.png, ...

    Raises:
        ValueError: if the folder holds anything: old and new samples must not mix.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"out={folder} is a folder that is not empty; name a new one")
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        _write_png(image, folder / f"{index:05d}.png")


def save_npz(images: Tensor, labels: Tensor | None, path: Path) -> None:
    """Write uint8 images as NHWC `arr_0`, and labels as `arr_1` when there are any (ADM's and OpenAI's layout)."""
    arrays: dict[str, Any] = {"arr_0": images.permute(0, 2, 3, 1).contiguous().numpy()}
    if labels is not None:
        arrays["arr_1"] = labels.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial.npz")
    np.savez(partial, **arrays)
    os.replace(partial, path)


def _write_png(image: Tensor, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(path)
