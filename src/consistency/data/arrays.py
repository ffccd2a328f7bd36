"""uint8 images [C, H, W] with a label: held in memory, or decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from consistency.data.cropping import Crop, with_channels
from consistency.data.sources import Source


@dataclass(frozen=True)
class ImageArray(Dataset[tuple[Tensor, Tensor]]):
    """Images held in memory, or mapped into it from a cache. A batch of indices is read in one call.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        classes: Names of the labels 0, 1, ...; empty where they have none.
        folder: Of the cache that the images lie in; None for images in memory.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...] = ()
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 [N, C, H, W], got {self.images.dtype} {list(self.images.shape)}")
        if len(self.images) == 0 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"got {len(self.images)} images and {len(self.labels)} labels; need as many, at least one")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """The batch (uint8 [B, C, H, W], int64 [B]); PyTorch's loader calls this instead of collating B items."""
        index = torch.as_tensor(indices)
        return self.images[index], self.labels[index]


class DecodedImages(Dataset[tuple[Tensor, int]]):
    """Images decoded when they are asked for: for sets that are too large for a cache. Use loader workers.

    Items are (uint8 [C, size, size], label), the same as those of the cache.

    Args:
        source: Where the images come from.
        image_size: Height and width.
        channels: 1 or 3.
        crop: See `cropping`.
        limit: So many images only, evenly spread over the set.

    Raises:
        ValueError: for other channels.
    """

    def __init__(self, source: Source, *, image_size: int, channels: int, crop: Crop, limit: int | None = None) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels}; change data.channels")
        self.source, self.image_size, self.channels, self.crop = source, image_size, channels, crop
        self.indices = spread(len(source), limit)
        self.labels = torch.from_numpy(np.asarray(source.labels, dtype=np.int64)[self.indices])
        self.classes = tuple(source.classes)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.decode(index)), int(self.labels[index])

    def decode(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [C, H, W].

        Raises:
            ImageError: one line that names the file.
        """
        at = int(self.indices[index])
        try:
            image = self.crop(with_channels(self.source.open(at), self.channels), self.image_size)
        except ValueError as error:  # of the crop, or of Pillow
            raise ImageError(f"{self.source.describe(at)} {error}") from error
        except Exception as error:  # Pillow's decoders raise a dozen kinds of errors on damaged files
            kind = type(error).__name__
            said = "" if kind == "UnidentifiedImageError" else str(error)  # that one only names a buffer
            reason = f"{kind}: {said.splitlines()[0][:100]}" if said else kind
            what = f"cannot be read as an image ({reason}); replace the file or take it out"
            raise ImageError(f"{self.source.describe(at)} {what}") from error
        pixels = np.asarray(image)  # [H, W] or [H, W, C]
        return np.array(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), order="C")


class ImageError(ValueError):
    """One image cannot be used; the message is one line and names it.

    PyTorch's loader raises errors of its workers anew, with the whole traceback as the message: only the last line of
    that is for the user.
    """

    def __init__(self, message: str) -> None:
        line = (message.strip().splitlines() or [""])[-1]
        super().__init__(line.removeprefix(f"{__name__}.ImageError: "))


def spread(count: int, limit: int | None) -> np.ndarray:
    """`limit` of `count` indices, all for None; evenly spread, because sets are sorted by class."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or null for all images, got {limit}; change data.dataset.limit")
    kept = count if limit is None else min(limit, count)
    return np.arange(kept, dtype=np.int64) * count // kept


def histogram(images: np.ndarray | Tensor) -> np.ndarray:
    """How often each of the 256 levels occurs in each channel of uint8 images [N, C, H, W]: int64 [C, 256]."""
    channels = np.asarray(images).swapaxes(0, 1)
    return np.stack([np.bincount(channel.ravel(), minlength=256) for channel in channels])


def mean_and_std(histograms: Iterable[np.ndarray]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel in [0, 1], exactly, from histograms of parts of a set."""
    counts = np.sum(list(histograms), axis=0) / 1.0
    levels = np.arange(256) / 255
    mean = counts @ levels / counts.sum(1)
    variance = (counts * (levels - mean[:, None]) ** 2).sum(1) / counts.sum(1)
    return mean.tolist(), np.sqrt(variance).tolist()
