"""The data module: which images training sees, as a pure function of (seed, images seen)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from consistency.data.arrays import histogram, mean_and_std
from consistency.data.cache import read_meta
from consistency.ops import append_dims, derive_seed, from_uint8, send

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
            batch: list[int] = []
            while len(batch) < self.batch_size:
                if (position + len(batch)) // self.num_images != epoch:
                    epoch = (position + len(batch)) // self.num_images
                    generator = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
                    order = torch.randperm(self.num_images, generator=generator)
                begin = position + len(batch) - epoch * self.num_images
                batch += order[begin : begin + self.batch_size - len(batch)].tolist()  # up to the end of the epoch
            yield batch
            position += self.batch_size * self.world_size


class _Indices(Dataset[int]):
    """0 .. N - 1, a batch at a time: what the loader yields when the images are on the device already."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: list[int]) -> Tensor:
        return torch.tensor(indices)


class ImageDataModule(L.LightningDataModule):
    """Batches (float32 [B, C, H, W] in [-1, 1], int64 [B]) of a data set, endlessly.

    Flips, conversion and augmentation happen on the device, and are a function of (seed, rank, images seen): a resumed
    run sees what the straight run would have seen.

    Args:
        dataset: Items (uint8 [C, H, W], label), or a function that makes the data set (configuration then costs
            nothing). One with `__getitems__` reads a batch in one call, as `ImageArray` does.
        batch_size: Images of one optimizer step over all ranks and accumulated micro-batches.
        seed: Of the order.
        image_size: Checked against the data.
        channels: Checked against the data.
        num_classes: Checked against the labels.
        sigma_data: Standard deviation of the pixels in [-1, 1], as preconditioning and weighting take it.
        num_workers: Loader processes; 0 is right for data in memory or in a cache.
        flip: Mirror each image left to right with probability 1/2.
        augment: `(images [B, C, H, W] in [-1, 1], CPU generator) -> (images, augmentation labels [B, 9])`. Batches are
            then triples (images, labels, augmentation labels). `NonLeakyAugment` flips by itself.
        on_device: Keep all images on the device, and have the loader send indices only; for sets that fit there.

    Raises:
        ValueError: if the data does not have the stated size, channels or labels, the batch does not divide, or the
            data cannot be kept on the device.
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
        sigma_data: float = 0.5,
        num_workers: int = 0,
        flip: bool = False,
        augment: Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]] | None = None,
        on_device: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}; change data.batch_size")
        if not sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}; change data.sigma_data")
        self._source, self.sigma_data = dataset, sigma_data
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.image_shape, self.num_classes = (channels, image_size, image_size), num_classes
        self.flip, self.augment, self.on_device = flip, augment, on_device
        self._dataset: Any = None
        self._read: tuple[Tensor, Tensor] | None = None  # of a data set that holds no tensors, in memory
        self._resident: tuple[Tensor, Tensor] | None = None  # on the device

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
        if self.num_classes and labels is not None:
            outside = [label for label in (int(labels.min()), int(labels.max())) if not 0 <= label < self.num_classes]
            if outside:
                raise ValueError(
                    f"the data set has a label {outside[0]}, the configuration says {self.num_classes} classes; "
                    "change data.num_classes"
                )
        classes = getattr(self.dataset, "classes", None) or ()
        if self.num_classes and len(classes) > 1 and len(classes) != self.num_classes:
            raise ValueError(
                f"the data set has {len(classes)} classes, the configuration says {self.num_classes}; "
                "change data.num_classes, or complete the data"
            )
        if self.on_device and not isinstance(getattr(self.dataset, "images", None), Tensor):
            raise ValueError("data.on_device=true needs a cache; set data.dataset.cache_dir, or data.on_device=false")

    def identity(self) -> dict[str, Any]:
        """What a run is trained on: a name for people, number of images, checksum of a cached set (else None)."""
        folder = getattr(self.dataset, "folder", None)
        meta = read_meta(folder) if folder is not None else None
        source = getattr(getattr(self._source, "func", self._source), "__name__", "images")
        name = f"{meta['source'] if meta else source}_{self.image_shape[1]}x{self.image_shape[2]}_{len(self.dataset)}"
        return {"id": name, "images": len(self.dataset), "sha256": meta["sha256"]["images"] if meta else None}

    def images(self, batch_size: int) -> Iterator[Tensor]:
        """All images of the set, in its order; uint8 [B, C, H, W]."""
        for indices in torch.arange(len(self.dataset)).split(batch_size):
            yield self._fetch(indices.tolist())[0]

    def in_memory(self, limit: int = 2**31) -> tuple[Tensor, Tensor]:
        """The whole set: images, uint8 [N, C, H, W] (of a cache, where there is one), and labels, int64 [N].

        Args:
            limit: Bytes that are read into memory when the data set does not hold its images as one tensor.

        Raises:
            ValueError: if the images would take more.
        """
        if not isinstance(getattr(self.dataset, "images", None), Tensor) and self._read is None:
            size = len(self.dataset) * torch.Size(self.image_shape).numel()
            if size > limit:
                raise ValueError(
                    f"the data set is decoded on the fly and would take {size / 1e9:.1f} GB of memory; set "
                    "data.dataset.cache_dir, or give a data set of your own `images` (uint8 [N, C, H, W]) and `labels`"
                )
            parts = [self._fetch(part.tolist()) for part in torch.arange(len(self.dataset)).split(512)]
            images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            self._read = images, labels
        return self._read or (self.dataset.images, torch.as_tensor(self.dataset.labels))

    def measure_sigma_data(self, max_images: int | None = None) -> float:
        """Standard deviation of the pixels in [-1, 1] around their channel mean, over at most `max_images` images.

        By default 10,000, or 1,000 of a set that is decoded on the fly (a start should not take a minute).
        """
        if max_images is None:
            max_images = 10_000 if hasattr(self.dataset, "__getitems__") else 1_000
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(0))[:max_images]
        parts = order.sort().values.split(512)  # in the order of the file
        _, std = mean_and_std(histogram(self._fetch(part.tolist())[0]) for part in parts)
        return 2 * (sum(value**2 for value in std) / len(std)) ** 0.5

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
        dataset = _Indices(len(self.dataset)) if self.on_device else self.dataset
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=_already_a_batch if hasattr(dataset, "__getitems__") else default_collate,
            pin_memory=torch.cuda.is_available(),
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Gather (`on_device`), flip, uint8 -> [-1, 1], augment; on the device.

        Lightning calls this right before the step of the same batch, so the counters of the run say where it stands;
        batches that workers have prepared in advance come by here in their turn.
        """
        images, labels = self._gather(batch) if self.on_device else batch
        if self.flip:
            parts = self._generators("flip", len(images))
            mirrored = torch.cat([torch.rand(len(part), generator=generator) for part, generator in parts]) < 0.5
            images = torch.where(append_dims(send(mirrored, images.device), images.ndim), images.flip(-1), images)
        images = from_uint8(images)
        if self.augment is None:
            return images, labels
        parts = self._generators("augment", len(images))
        augmented = [self.augment(images[part.start : part.stop], generator) for part, generator in parts]
        images, augment_labels = (torch.cat(results) for results in zip(*augmented, strict=True))
        return images, labels, augment_labels

    def _generators(self, purpose: str, count: int) -> list[tuple[range, torch.Generator]]:
        """Randomness of this rank at this place of the run; on the CPU, so that every device gets the same.

        One for all images of the micro-batch, or one for each (`progress.image_seed`).
        """
        trainer = self.trainer
        assert trainer is not None
        progress: Any = trainer.lightning_module.progress
        seeds = progress.seeds_of_images(count, trainer.global_rank, purpose)
        if seeds is not None:
            return [(range(i, i + 1), torch.Generator().manual_seed(seed)) for i, seed in enumerate(seeds)]
        position = progress.images_seen + progress.pending
        seed = derive_seed(purpose, self.seed, trainer.global_rank, position)
        return [(range(count), torch.Generator().manual_seed(seed))]

    def _gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        if self._resident is None or self._resident[0].device != indices.device:
            try:
                self._resident = self.dataset.images.to(indices.device), self.dataset.labels.to(indices.device)
            except torch.OutOfMemoryError as error:
                size = self.dataset.images.nbytes / 1e9
                raise ValueError(
                    f"the images ({size:.1f} GB) do not fit on the device; set data.on_device=false"
                ) from error
        images, labels = self._resident
        return images[indices], labels[indices]

    def _fetch(self, indices: list[int]) -> Any:
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(indices)
        return default_collate([self.dataset[index] for index in indices])


def warn_about_sigma_data(measured: float, setting: float) -> None:
    """Warn when the data's standard deviation is more than 20 % off the setting that preconditioning uses."""
    if abs(measured / setting - 1) > 0.2:
        log.warning(
            "data.sigma_data is %s, but the data has a standard deviation of %.3f in [-1, 1]; the preconditioning is "
            "off. Set data.sigma_data=%.2f",
            setting,
            measured,
            measured,
        )


def _already_a_batch(batch: Any) -> Any:
    return batch
