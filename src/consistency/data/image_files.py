"""Images on disk: grids, single PNGs, and the `.npz` that the field's evaluators read."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from consistency.data.sources import Files
from consistency.io.atomic import atomic_write
from consistency.io.safe_load import read_json, read_npz

MANIFEST = "sampling.json"  # in a folder of samples: how they were drawn, and whether all are there
_GRID = "consistency, a grid of images"  # in the PNG's text
_FRAME = 2  # white pixels around a cell


def image_grid(images: Tensor, columns: int | None = None, min_cell: int = 32) -> Tensor:
    """uint8 [N, C, H, W] -> one uint8 picture [3, H', W'], row by row; small images are enlarged by whole pixels.

    Args:
        images: The images.
        columns: Images in a row; None for a nearly square grid.
        min_cell: Smallest side of a cell, in pixels.
    """
    columns = columns or int(np.ceil(len(images) ** 0.5))
    factor = -(-min_cell // images.shape[-1])
    images = images.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)
    images = images.expand(-1, 3, -1, -1)
    if len(images) == 1:
        return images[0]  # without a frame
    height, width = images.shape[-2] + _FRAME, images.shape[-1] + _FRAME
    columns, rows = min(columns, len(images)), -(-len(images) // columns)
    grid = torch.full((3, rows * height + _FRAME, columns * width + _FRAME), 255, dtype=torch.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * height + _FRAME, number % columns * width + _FRAME
        grid[:, top : top + height - _FRAME, left : left + width - _FRAME] = image
    return grid


def save_grid(images: Tensor, path: str | Path, columns: int | None = None) -> None:
    """Write `image_grid` of uint8 images [N, C, H, W] as one PNG, which says that it is one."""
    save_png(image_grid(images, columns), Path(path), Software=_GRID)


def save_gif(frames: Sequence[Tensor], path: Path, *, seconds: float = 0.3, last: float = 2.0) -> None:
    """Write grids of uint8 images [N, C, H, W], one a frame, as an endless GIF.

    Args:
        frames: In the order of time.
        path: Of the file.
        seconds: A frame is shown.
        last: Seconds that the last frame is shown.
    """
    from PIL import Image

    first, *others = [Image.fromarray(image_grid(frame).permute(1, 2, 0).numpy()) for frame in frames]
    durations = [round(1000 * seconds)] * len(others) + [round(1000 * last)]
    options: dict[str, Any] = {"append_images": others, "duration": durations, "loop": 0, "comment": _GRID.encode()}
    with atomic_write(path) as partial:
        first.save(partial, format="GIF", save_all=True, **options)


def is_grid(path: Path) -> bool:
    """Whether a file is a PNG of `save_grid` or a GIF of `save_gif`, which may be replaced."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG", "GIF")) as image:
            return _GRID in (image.info.get("Software"), image.info.get("comment", b"").decode())
    except Exception:  # whatever it is, it is no grid
        return False


def save_pngs(images: Tensor, folder: Path) -> None:
    """Write uint8 images [N, C, H, W] as 00000.png, 00001.png, ...

    Raises:
        ValueError: if the folder holds anything: old and new samples must not mix.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"out={folder} is a folder that is not empty; name a new one")
    for index, image in enumerate(images):
        save_png(image, folder / f"{index:05d}.png")


def read_images(source: str | Path) -> Tensor:
    """uint8 [N, C, H, W] from a folder of images (in the order of their names) or the `arr_0` of an `.npz`.

    Raises:
        ValueError: in one line, if there are none, not yet all of a command's, or of different sizes.
    """
    source = Path(source)
    if source.is_dir():
        _check_finished(source)
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


def _check_finished(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        found = read_json(folder / MANIFEST)
        if isinstance(found, dict) and found.get("finished") is False:
            raise ValueError(f"{folder} is not complete; the command consistency-sample that began it goes on with it")


def to_nhwc(images: Tensor) -> np.ndarray:
    """[N, C, H, W] -> array [N, H, W, C], the layout of files."""
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def save_npz(
    parts: Iterable[bytes], shape: tuple[int, ...], labels: Tensor | None, path: Path, *, note: str = ""
) -> None:
    """Write uint8 images as NHWC `arr_0`, and labels as `arr_1` when there are any (ADM's and OpenAI's layout).

    Args:
        parts: Bytes of the images, one after the other; a part at a time is in memory.
        shape: (N, H, W, C) of all of them.
        labels: [N] int64.
        path: Of the file.
        note: See `npz_note`.

    Raises:
        ValueError: if the parts are not as many bytes as the shape says.
    """
    left = int(np.prod(shape))
    with atomic_write(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for part in parts:
                left -= file.write(part)
        if left != 0:
            raise ValueError(f"{path} would lack {left:,} bytes of {list(shape)}")
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                npy.write_array(file, labels.numpy(), allow_pickle=False)
        archive.comment = note.encode()


def npz_note(path: Path) -> Any:
    """The JSON that `save_npz` left in the zip's comment; None if it is another file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.comment)
    except (OSError, zipfile.BadZipFile, ValueError):
        return None


def save_png(image: Tensor, path: Path, **text: str) -> None:
    """Write a uint8 image [C, H, W] in one rename, with notes such as Software="..."."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    pixels = image.permute(1, 2, 0).contiguous().numpy()
    notes = PngInfo()
    for key, value in text.items():
        notes.add_text(key, value)
    with atomic_write(path, flush=False) as partial:  # a run of samples writes thousands
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(partial, format="PNG", pnginfo=notes)
