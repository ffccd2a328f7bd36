"""From an image of any mode and shape to a square one: the crops that the field's numbers were made with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps
from PIL.Image import Resampling

# (image, size) -> image of size x size
Crop: TypeAlias = Callable[[Image.Image, int], Image.Image]


def adm(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop, that of ImageNet-64 in ADM, EDM and CM: halve by boxes, go on bicubically, cut the middle.

    Boxes of 2x2 while the short side is at least 2 size, then bicubic until it is size (smaller images grow).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def edm(image: Image.Image, size: int) -> Image.Image:
    """EDM's `center-crop`: cut the middle square, then resize it in one go with Lanczos (smaller images grow)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Resampling.LANCZOS)


def exact(image: Image.Image, size: int) -> Image.Image:
    """No crop: the image must be size x size already.

    Raises:
        ValueError: if it is not.
    """
    if image.size != (size, size):
        raise ValueError(
            f"is {image.width}x{image.height}, not {size}x{size}; change data.image_size, or let it be cropped: "
            "data.dataset.crop._target_=consistency.data.cropping.adm"
        )
    return image


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """The upright image in mode L (`channels` 1: luma, ITU-R 601) or RGB (3: grey is repeated), 8 bits.

    The camera's rotation (EXIF) is applied, transparent parts become white, 16-bit grey is rounded to 8 bits.

    Raises:
        ValueError: for pixels without a known range (floats, 32-bit integers).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return image.convert({1: "L", 3: "RGB"}[channels])


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits: 65535 becomes 255. Pillow's own conversion would clip at 255."""
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"has pixels of mode {image.mode}, whose range is not known; save it with 8 or 16 bits")
    return Image.fromarray(np.rint(pixels / 257).astype(np.uint8))
