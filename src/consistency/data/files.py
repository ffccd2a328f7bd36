"""Images on disk: grids, single PNGs, and the `.npz` that the field's evaluators read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consistency.data.sources import Files
from consistency.reading import read_npz

_GRID = "consistency, a grid of images"  # in the PNG's text


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
    """Write `image_grid` of uint8 images [N, C, H, W] as one PNG, which says that it is one."""
    _write_png(image_grid(images, columns), path, Software=_GRID)


def is_grid(path: Path) -> bool:
    """Whether a file is a PNG of `save_grid`, which may be replaced."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.info.get("Software") == _GRID
    except Exception:  # whatever it is, it is no grid
        return False


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


def read_images(source: str | Path) -> Tensor:
    """uint8 [N, C, H, W] from a folder of images (in the order of their names) or the `arr_0` of an `.npz`.

    Raises:
        ValueError: in one line, if there are none, or of different sizes.
    """
    source = Path(source)
    if source.is_dir():
        files = Files(source)
        arrays = [_decoded(files, index) for index in range(len(files))]
        if different := [index for index, array in enumerate(arrays) if array.shape != arrays[0].shape]:
            name, shape = files.describe(different[0]), list(arrays[different[0]].shape)
            raise ValueError(f"{name} is {shape}, the first image {list(arrays[0].shape)}; they must be alike")
        array = np.stack(arrays)
    else:
        array = read_npz(source, ["arr_0"]).get("arr_0", np.empty(0))
    array = array[..., None] if array.ndim == 3 else array
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise ValueError(f"{source} holds {array.dtype} {list(array.shape)}; expected uint8 images [N, H, W, 1 or 3]")
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def _decoded(files: Files, index: int) -> np.ndarray:
    try:
        return np.asarray(files.open(index))
    except Exception as error:  # Pillow's decoders raise a dozen kinds of errors on damaged files
        raise ValueError(
            f"{files.describe(index)} cannot be read as an image; replace the file or take it out"
        ) from error


def save_npz(images: Tensor, labels: Tensor | None, path: Path) -> None:
    """Write uint8 images as NHWC `arr_0`, and labels as `arr_1` when there are any (ADM's and OpenAI's layout)."""
    arrays: dict[str, Any] = {"arr_0": images.permute(0, 2, 3, 1).contiguous().numpy()}
    if labels is not None:
        arrays["arr_1"] = labels.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial.npz")
    np.savez(partial, **arrays)
    os.replace(partial, path)


def _write_png(image: Tensor, path: Path, **text: str) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    notes = PngInfo()
    for key, value in text.items():
        notes.add_text(key, value)
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(path, pnginfo=notes)
