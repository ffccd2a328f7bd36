"""Pictures between the browser and the model: bounded before anything is decoded, enlarged by whole pixels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from consistency.data.cropping import edm, with_channels
from consistency.data.image_files import image_grid
from consistency.data.sources import FORMATS
from consistency.sampling.operators import enlarge

MAX_PIXELS = 1 << 24  # of an upload, decoded: 64 MB as RGBA
_BOARD, _RESULT = 320, 480  # width of an editor and of a result, in screen pixels


def read_upload(path: str | Path, shape: tuple[int, int, int]) -> Tensor:
    """An uploaded file as uint8 [C, H, W]: the middle of it, at the model's size; grey or colour as the model has it.

    Raises:
        ValueError: in one line, if it is no image, or declares more than `MAX_PIXELS`; nothing is decoded then.
    """
    channels, height, width = shape
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width:,} x {image.height:,} pixels"
                raise _RefusedError(f"the upload has {size}; allowed: {MAX_PIXELS:,} in all; make it smaller")
            upright = with_channels(image, channels)
    except _RefusedError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds of errors on damaged files
        raise ValueError(f"the upload is not a readable image; allowed: {', '.join(FORMATS)}") from error
    # `edm` cuts the square before it resizes: a strip of 1 x 16 million pixels would grow in other crops.
    return _tensor(upright if upright.size == (width, height) else edm(upright, height))


class _RefusedError(ValueError):
    """Written for the user, unlike what Pillow says."""


def read_drawing(board: Any, shape: tuple[int, int, int]) -> Tensor:
    """What was drawn in Gradio's editor, at the model's size: uint8 [4, H, W] as RGBA; a pixel is the mean of its area.

    Args:
        board: `{"layers": [uint8 arrays [H', W', 4]], ...}`; anything else has no drawing.
        shape: Of the model's images.
    """
    _, height, width = shape
    layers = board["layers"] if isinstance(board, dict) else []
    if not layers:
        return torch.zeros(4, height, width, dtype=torch.uint8)
    return _tensor(Image.fromarray(layers[-1]).resize((width, height), Image.Resampling.BOX))


def enlarged(image: Tensor) -> np.ndarray:
    """uint8 [C, H, W] as an array [H', W', 3] of about `_BOARD` pixels: each pixel becomes a square."""
    return _array(enlarge(image, max(_BOARD // image.shape[-1], 1)).expand(3, -1, -1))


def picture(images: Tensor) -> np.ndarray:
    """uint8 [N, C, H, W] as one array [H', W', 3]: a nearly square grid, small images enlarged by whole pixels."""
    columns = math.ceil(len(images) ** 0.5) if len(images) > 3 else len(images)
    cell = max(_RESULT // columns // images.shape[-1], 1) * images.shape[-1]  # image_grid rounds up
    return _array(image_grid(images, columns, cell))


def _array(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def painted(image: Tensor | None, drawing: Tensor, channels: int) -> Tensor:
    """The drawing [4, H, W] over an image [1, C, H, W] (None: black), as [1, C, H, W]; grey by luma where C is 1."""
    alpha = drawing[3:].float() / 255
    below = torch.zeros(3, *drawing.shape[1:]) if image is None else image[0].expand(3, -1, -1).float()
    rgb = (alpha * drawing[:3].float() + (1 - alpha) * below).round().to(torch.uint8)
    return _tensor(with_channels(Image.fromarray(_array(rgb)), channels))[None]


def _tensor(image: Image.Image) -> Tensor:
    """uint8 [C, H, W] of an image of mode L, RGB or RGBA."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))
