"""The data sets: each a source brought to one size by `image_set`.

All but the digits take the options of `image_set`: `image_size`, `channels`, `crop`, `cache_dir`, `limit`.
"""

from __future__ import annotations

from colorsys import hsv_to_rgb
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consistency.data.arrays import DecodedImages, ImageArray
from consistency.data.cache import cached
from consistency.data.cropping import Crop, adm, exact
from consistency.data.downloads import Cifar10, Flowers102, HuggingFace
from consistency.data.sources import Files, Lmdb, Source, Zip
from consistency.ops import derive_seed

Images = ImageArray | DecodedImages


def image_set(
    source: Source,
    *,
    image_size: int,
    channels: int = 3,
    crop: Crop = adm,
    cache_dir: str | Path | None = None,
    limit: int | None = None,
) -> Images:
    """The images of a source at one size, from a cache, or decoded when they are asked for.

    Args:
        source: Where the images come from.
        image_size: Height and width.
        channels: 1 (grey) or 3 (colour); images of the other kind are converted.
        crop: How images get to that size: `cropping.adm`, `edm`, or `exact`, which only checks.
        cache_dir: Of all caches; None decodes on the fly, for sets that are larger than the disk.
        limit: So many images only, evenly spread over the set.
    """
    if cache_dir is None:
        return DecodedImages(source, image_size=image_size, channels=channels, crop=crop, limit=limit)
    return cached(source, image_size=image_size, channels=channels, crop=crop, cache_dir=cache_dir, limit=limit)


def digits(limit: int | None = None) -> ImageArray:
    """The 1,797 real 8x8 digits that scikit-learn ships, grey, 10 classes; values 0..16 become 0..255.

    Args:
        limit: Only the first so many.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images[:, None] * (255 / 16)).astype(np.uint8)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    return ImageArray(torch.from_numpy(images)[:limit], labels[:limit], tuple("0123456789"))


def tinted_digits(limit: int | None = None) -> ImageArray:
    """The digits of `digits`, each in one bright hue: a small colour set for trying out colorization.

    The hue is a function of the image's index. Black stays black; white becomes the hue.
    """
    grey = digits(limit)
    hues = [derive_seed("hue", index) / 2**63 for index in range(len(grey.images))]
    colours = torch.tensor([hsv_to_rgb(hue, 1.0, 1.0) for hue in hues])
    images = (grey.images * colours[:, :, None, None]).round().to(torch.uint8)
    return ImageArray(images, grey.labels, grey.classes)


def cifar10(root: str | Path, *, train: bool = True, **options: Any) -> Images:
    """CIFAR-10: 50,000 (`train`) or 10,000 colour images 32x32, 10 classes; downloaded to `root` if it is not there."""
    return image_set(Cifar10(root, train=train), **{"image_size": 32, "crop": exact, **options})


def flowers102(root: str | Path, **options: Any) -> Images:
    """flowers-102: all 8,189 images, 102 classes; downloaded to `root` if it is not there."""
    return image_set(Flowers102(root), **{"image_size": 64, **options})


def image_folder(path: str | Path, **options: Any) -> Images:
    """A folder of images; its sub-folders, sorted by name, are the classes. ImageNet is one."""
    return image_set(Files(path), **options)


def image_zip(path: str | Path, **options: Any) -> Images:
    """A zip of images with an optional `dataset.json` of labels, as EDM's dataset tool writes; not cropped."""
    return image_set(Zip(path), **{"crop": exact, **options})


def lsun(path: str | Path, **options: Any) -> Images:
    """A category of LSUN, without labels: the LMDB as it comes, or a folder of its images at any depth."""
    source = Lmdb(path) if Path(str(path), "data.mdb").exists() else Files(path, labelled=False)
    return image_set(source, **{"image_size": 256, **options})


def hugging_face(
    name: str,
    *,
    split: str = "train",
    config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    **options: Any,
) -> Images:
    """A set of Hugging Face's hub, or a folder that `datasets` reads; columns are found by their type."""
    columns = {"image_column": image_column, "label_column": label_column}
    return image_set(HuggingFace(name, split=split, config=config, **columns), **options)
