"""The data module: which images training sees, as a pure function of (seed, images seen)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from consistency.ops import derive_seed, from_uint8

log = logging.getLogger(__name__)


class ShuffledBatches(Sampler[list[int]]):
    """Endless batches of indices; batch b of rank r holds fixed global positions, whatever happened before.

    Global position p is image `permutation(seed, p // N)[p % N]`. One micro-batch of all ranks covers consecutive
    positions, rank r the r-th part of them. Starting at `start` continues exactly there.

    Args:
        num_images: N.
        batch_size: Images of one rank in one micro-batch.
        seed: Of the permutations.
        start: Images already seen, over all ranks; asked when iteration begins.
        rank: Of this process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int,
        start: Callable[[], int] = int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.start, self.rank, self.world_size = start, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        position = self.start() + self.rank * self.batch_size
        while True:
            batch = []
            for p in range(position, position + self.batch_size):
                if p // self.num_images != epoch:
                    epoch = p // self.num_images
                    generator = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
                    order = torch.randperm(self.num_images, generator=generator)
                batch.append(int(order[p % self.num_images]))
            yield batch
            position += self.batch_size * self.world_size


class ImageDataModule(L.LightningDataModule):
    """Batches (float32 [B, C, H, W] in [-1, 1], int64 [B]) of a data set, endlessly.

    Args:
        dataset: Items (uint8 [C, H, W], label), or a function that makes the data set (configuration then costs
            nothing). One with `__getitems__` reads a batch in one call, as `ImageArray` does.
        batch_size: Images of one optimizer step over all ranks and accumulated micro-batches.
        seed: Of the order.
        image_size: Checked against the data.
        channels: Checked against the data.
        num_classes: Checked against the labels.
        num_workers: Loader processes; 0 is right for data in memory.

    Raises:
        ValueError: if the data does not have the stated size, channels or labels, or the batch does not divide.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Callable[[], Dataset[Any]],
        *,
        batch_size: int,
        seed: int,
        image_size: int,
        channels: int,
        num_classes: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}; change data.batch_size")
        self._source = dataset
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.image_shape, self.num_classes = (channels, image_size, image_size), num_classes
        self._dataset: Any = None

    @property
    def dataset(self) -> Any:
        """The data set, made on first use."""
        if self._dataset is None:
            self._dataset = self._source if isinstance(self._source, Dataset) else self._source()
        return self._dataset

    def setup(self, stage: str) -> None:
        """Check the data against what the configuration says of it."""
        image, _ = self.dataset[0]
        if tuple(image.shape) != self.image_shape:
            raise ValueError(
                f"images of the data set are {list(image.shape)}, the configuration says {list(self.image_shape)}; "
                "change data.channels or data.image_size"
            )
        labels = getattr(self.dataset, "labels", None)
        if self.num_classes and labels is not None and int(labels.max()) >= self.num_classes:
            raise ValueError(
                f"the data set has a label {int(labels.max())}, the configuration says {self.num_classes} classes; "
                "change data.num_classes"
            )

    def sigma_data(self, max_images: int = 10_000) -> float:
        """Standard deviation of the pixels in [-1, 1] around their channel mean, over at most `max_images` images."""
        count = min(len(self.dataset), max_images)
        index = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(0))[:count].tolist()
        images = from_uint8(self._fetch(index)[0])
        return images.transpose(0, 1).flatten(1).var(dim=1, correction=0).mean().sqrt().item()

    def train_dataloader(self) -> DataLoader[Any]:
        """The endless loader of this rank, from where the run stands."""
        trainer = self.trainer
        assert trainer is not None
        parts = trainer.world_size * trainer.accumulate_grad_batches
        if self.batch_size % parts:
            raise ValueError(
                f"data.batch_size={self.batch_size} is the batch over all ranks and must be divisible by "
                f"{trainer.world_size} (processes) x {trainer.accumulate_grad_batches} (accumulate_grad_batches)"
            )
        progress: Any = trainer.lightning_module.progress
        batches = ShuffledBatches(
            len(self.dataset),
            self.batch_size // parts,
            seed=self.seed,
            start=lambda: progress.images_seen,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        return DataLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=_already_a_batch if hasattr(self.dataset, "__getitems__") else default_collate,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """uint8 -> [-1, 1], on the device."""
        images, labels = batch
        return from_uint8(images), labels

    def _fetch(self, indices: list[int]) -> Any:
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(indices)
        return default_collate([self.dataset[index] for index in indices])


def warn_about_sigma_data(measured: float, setting: float) -> None:
    """Warn when the data's standard deviation is more than 20 % off the setting that all scalings use."""
    if abs(measured / setting - 1) > 0.2:
        log.warning(
            "noise.sigma_data is %s, but the data has a standard deviation of %.3f in [-1, 1]; the preconditioning is "
            "off. Set noise.sigma_data=%.2f",
            setting,
            measured,
            measured,
        )


def _already_a_batch(batch: Any) -> Any:
    return batch
