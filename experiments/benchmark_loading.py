"""Images per second of our pipeline next to torchvision's transforms in a `DataLoader`, over the same images.

    python experiments/benchmark_loading.py                        # 50,000 random colour images 32x32, no download
    python experiments/benchmark_loading.py --zip cifar10.zip --threads 2

Ours: `ImageDataModule` over a mapped cache: batch of indices -> gather -> flip -> [-1, 1], the loader and the hook that
training uses. Theirs: PIL image -> RandomHorizontalFlip -> ToTensor -> Normalize, default collation. Both end with
float32 batches on the device. Runs are interleaved, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from consistency.data.arrays import ImageArray
from consistency.data.cache import cached
from consistency.data.cropping import adm, exact
from consistency.data.datasets import digits, image_folder, image_zip
from consistency.data.module import ImageDataModule
from consistency.methods.progress import Progress


class RandomImages:
    """A source of 50,000 images of noise, labels 0 to 9."""

    name, classes, count, size = "random", [str(label) for label in range(10)], 50_000, 32

    def __init__(self) -> None:
        shape = (self.count, self.size, self.size, 3)
        self.pixels = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
        self.labels = [index % 10 for index in range(self.count)]

    def __len__(self) -> int:
        return self.count

    def open(self, index: int) -> Image.Image:
        """The image."""
        return Image.fromarray(self.pixels[index])

    def describe(self, index: int) -> str:
        """Its number."""
        return f"random image {index}"

    def fingerprint(self) -> str:
        """Always the same."""
        return "random"


class InMemory(Dataset[Any]):
    """What torchvision's CIFAR10 does with its array: a PIL image a call, then the transforms."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        channels = images.shape[1]
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.pixels = pixels[..., 0] if channels == 1 else pixels
        self.labels = labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * channels, [0.5] * channels),
            ]
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def ours(dataset: ImageArray, batch_size: int, device: torch.device, on_device: bool) -> Iterator[torch.Tensor]:
    """Endless batches through the loader and the hook of training."""
    channels, size, _ = dataset.images.shape[1:]
    settings = {"batch_size": batch_size, "seed": 0, "image_size": size, "channels": channels}
    data = ImageDataModule(dataset, **settings, flip=True, on_device=on_device)
    progress = Progress()
    method = SimpleNamespace(progress=progress)
    trainer: Any = SimpleNamespace(lightning_module=method, world_size=1, global_rank=0, accumulate_grad_batches=1)
    data.trainer = trainer
    for batch in data.train_dataloader():
        moved = batch.to(device) if on_device else [part.to(device, non_blocking=True) for part in batch]
        images, _ = data.on_after_batch_transfer(moved, 0)
        progress.count(len(images))
        progress.advance()
        yield images


def theirs(dataset: ImageArray, batch_size: int, device: torch.device, num_workers: int) -> Iterator[torch.Tensor]:
    """Endless batches of a plain `DataLoader`."""
    data = InMemory(dataset.images, dataset.labels)
    loader = DataLoader(
        data, batch_size, shuffle=True, drop_last=True, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    while True:
        for images, _ in loader:
            yield images.to(device)


def rate(batches: Iterator[torch.Tensor], seconds: float, device: torch.device) -> float:
    """Images per second after a warm-up of two batches."""
    for _ in islice(batches, 2):
        pass
    _wait(device)
    started, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        count += len(next(batches))
        _wait(device)
    return count / passed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def load(args: argparse.Namespace, cache_dir: str) -> ImageArray:
    """The images that both sides read."""
    if args.digits:
        return digits()
    settings: dict[str, Any] = {"image_size": args.image_size, "channels": 3, "cache_dir": cache_dir}
    found: Any
    if args.zip:
        found = image_zip(args.zip, crop=adm, **settings)
    elif args.folder:
        found = image_folder(args.folder, crop=adm, **settings)
    else:
        found = cached(RandomImages(), **{**settings, "image_size": RandomImages.size}, crop=exact)
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--zip", type=Path, help="a zip of images")
    choice.add_argument("--folder", type=Path, help="a folder of images")
    choice.add_argument("--digits", action="store_true", help="scikit-learn's digits")
    parser.add_argument("--image-size", type=int, default=32, help="of --zip and --folder")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1, help="of torch in the main process")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as cache_dir:
        dataset = load(args, cache_dir)
        sides: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
            "ours, mapped cache": lambda: ours(dataset, args.batch_size, device, False),
            "ours, on_device": lambda: ours(dataset, args.batch_size, device, True),
            "torchvision, 0 workers": lambda: theirs(dataset, args.batch_size, device, 0),
            "torchvision, 2 workers": lambda: theirs(dataset, args.batch_size, device, 2),
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.repeats):
            for name, make in sides.items():
                rates[name].append(rate(make(), args.seconds, device))
    machine = f"{platform.machine()}, {args.threads} threads, {device}, torch {torch.__version__}"
    print(f"{len(dataset):,} images {list(dataset.images.shape[1:])}, batch {args.batch_size}, {machine}")
    print(f"{args.repeats} interleaved runs of {args.seconds:g} s each\n")
    print("| pipeline | images/s, median | lowest | highest |\n|---|---|---|---|")
    for name, values in rates.items():
        cells = (statistics.median(values), min(values), max(values))
        print(f"| {name} | " + " | ".join(f"{value:,.0f}" for value in cells) + " |")
    if args.out:
        args.out.write_text(json.dumps({"machine": machine, "batch_size": args.batch_size, "rates": rates}, indent=2))


if __name__ == "__main__":
    main()
