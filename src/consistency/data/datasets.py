"""Data sets: uint8 images [C, H, W] with a label. A batch of indices is read in one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class ImageArray(Dataset[tuple[Tensor, Tensor]]):
    """Images held in memory.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
    """

    images: Tensor
    labels: Tensor

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
        return self.images[indices], self.labels[indices]


def digits(limit: int | None = None) -> ImageArray:
    """The 1,797 real 8x8 digits that scikit-learn ships, grey, 10 classes; values 0..16 become 0..255.

    Args:
        limit: Only the first so many.
    """
    import numpy as np
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images[:, None] * (255 / 16)).astype(np.uint8)
    return ImageArray(torch.from_numpy(images)[:limit], torch.from_numpy(bunch.target.astype(np.int64))[:limit])
