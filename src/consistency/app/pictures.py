"""Pictures between the browser and the model: bounded before anything is decoded, enlarged by whole pixels."""

from __future__ import annotations

import base64
import binascii
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from consistency.data.cropping import edm, with_channels
from consistency.data.sources import FORMATS

MAX_PIXELS = 1 << 24  # of an upload, decoded: 64 MB as RGBA
_PNG = "data:image/png;base64,"


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


def read_board(value: Any, shape: tuple[int, int, int]) -> tuple[Tensor | None, Tensor]:
    """What lies on a board of the page: (image uint8 [C, H, W] or None, drawing uint8 [4, H, W] as RGBA).

    Args:
        value: JSON of the browser: `{"image": PNG or null, "drawing": PNG or null}`, as data URLs of the board's size.
        shape: Of the model's images.

    Raises:
        ValueError: in one line, for anything else.
    """
    channels, height, width = shape
    if value is None:
        return None, torch.zeros(4, height, width, dtype=torch.uint8)
    limit = 16 * height * width + 8192  # two raw RGBA pictures in base64 are below it
    if not isinstance(value, str) or len(value) > limit:
        raise ValueError(f"the drawing is larger than {limit:,} characters, the limit for {width}x{height} pixels")
    try:
        board = json.loads(value)
        image, drawing = (_read_png(board[key], width, height) for key in ("image", "drawing"))
    except (ValueError, TypeError, KeyError, RecursionError, OSError, SyntaxError) as error:
        raise ValueError("the drawing did not arrive whole; clear it and draw again") from error
    layer = torch.zeros(4, height, width, dtype=torch.uint8) if drawing is None else _tensor(drawing.convert("RGBA"))
    return None if image is None else _tensor(with_channels(image, channels)), layer


def _read_png(url: Any, width: int, height: int) -> Image.Image | None:
    if url is None:
        return None
    if not (isinstance(url, str) and url.startswith(_PNG)):
        raise ValueError("not a PNG")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(url[len(_PNG) :], validate=True)), formats=("PNG",))
    except binascii.Error as error:
        raise ValueError("not base64") from error
    if image.size != (width, height):
        raise ValueError("of another size")
    image.load()
    return image


def write_board(image: Tensor | None) -> str:
    """The JSON that puts an image, uint8 [C, H, W], on a board and wipes the drawing."""
    return json.dumps({"image": None if image is None else data_url(image), "drawing": None})


def data_url(image: Tensor) -> str:
    """uint8 [1, 3 or 4, H, W] as a PNG in a URL."""
    pixels = image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return _PNG + base64.b64encode(buffer.getvalue()).decode()


def painted(image: Tensor | None, drawing: Tensor, channels: int) -> Tensor:
    """The drawing [4, H, W] laid over an image (None: black); uint8 [C, H, W], grey by luma where C is 1."""
    alpha = drawing[3:].float() / 255
    below = torch.zeros(3, *drawing.shape[1:]) if image is None else image.expand(3, -1, -1).float()
    rgb = (alpha * drawing[:3].float() + (1 - alpha) * below).round().to(torch.uint8)
    return _tensor(with_channels(Image.fromarray(np.ascontiguousarray(rgb.permute(1, 2, 0).numpy())), channels))


def _tensor(image: Image.Image) -> Tensor:
    """uint8 [C, H, W] of an image of mode L, RGB or RGBA."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))
