"""A set of images brought to one size, kept on disk as uint8 arrays and mapped into memory.

    <cache_dir>/<set>-<size>x<size>-<key>/images.npy   uint8 [N, C, H, W]
                                          labels.npy   int64 [N]
                                          meta.json    settings, classes, mean, std, checksums

The key is a hash of content and settings, so another crop is another folder and nothing is ever out of date.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consistency.data.arrays import DecodedImages, ImageArray, histogram, mean_and_std
from consistency.data.cropping import Crop
from consistency.data.sources import Source
from consistency.io.progress import counting
from consistency.io.run_dir import locked
from consistency.io.safe_load import first_line, read_json

log = logging.getLogger(__name__)

VERSION = 1  # of the layout, and of how pixels are made
ARRAYS = ("images.npy", "labels.npy")
_BLOCK_BYTES, _TASK = 8 << 20, 32  # written at a time; images that a thread decodes at a time


def cached(
    source: Source, *, image_size: int, channels: int, crop: Crop, cache_dir: str | Path, limit: int | None = None
) -> ImageArray:
    """The images of a source at one size, from the cache; made first if it is not there.

    Processes that ask at once (ranks of torchrun) build it once. The pages are shared by all who map them.

    Args:
        source: Where the images come from.
        image_size: Height and width.
        channels: 1 or 3.
        crop: See `cropping`.
        cache_dir: Of all caches.
        limit: So many images only, evenly spread over the set.

    Raises:
        ValueError: if an image cannot be used, the disk is too small, or `cache_dir` cannot be made.
    """
    settings = {
        "version": VERSION,
        "fingerprint": source.fingerprint(),
        "image_size": image_size,
        "channels": channels,
        "crop": _describe(crop),
        "limit": limit,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(cache_dir) / f"{re.sub(r'[^A-Za-z0-9_.]+', '_', source.name)}-{image_size}x{image_size}-{key}"
    if (found := _open(folder)) is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"{folder.parent} cannot be made a folder ({error.strerror})"
        raise ValueError(f"{what}; change paths.cache_dir, or data.dataset.cache_dir") from error
    with locked(folder):
        if (found := _open(folder)) is None:  # unless another process has built it meanwhile
            images = DecodedImages(source, image_size=image_size, channels=channels, crop=crop, limit=limit)
            _build(images, folder, settings)
            found = _open(folder)
    assert found is not None
    return found


def read_meta(folder: Path) -> dict[str, Any]:
    """What a cache says of itself: settings, count, classes, mean, std, sha256, bytes."""
    meta = read_json(folder / "meta.json")
    if not isinstance(meta, dict):
        raise ValueError(f"{folder / 'meta.json'} is not a table")
    return meta


def _open(folder: Path) -> ImageArray | None:
    """The cache in a folder, or None where there is none, or a damaged one."""
    if not folder.exists():
        return None
    try:
        meta = read_meta(folder)
        if len(meta["mean"]) != len(meta["std"]) or not all(isinstance(n, float) for n in meta["mean"] + meta["std"]):
            raise ValueError("mean and std are not lists of numbers")
        if not isinstance(meta["source"], str) or not isinstance(meta["sha256"]["images"], str):
            raise ValueError("source or sha256 is not text")
        damaged = [name for name in ARRAYS if (folder / name).stat().st_size != meta["bytes"][name]]
        if not damaged:
            # Copy on write: a mapping is shared until written to, and PyTorch does not warn of read-only memory.
            images, labels = (
                torch.from_numpy(np.load(folder / name, mmap_mode="c", allow_pickle=False)) for name in ARRAYS
            )
            return ImageArray(images, labels.long(), tuple(map(str, meta["classes"])), folder)
    except Exception as error:  # NumPy's parser of headers fails in every way on damaged input
        damaged = [first_line(error)]
    log.warning("%s is damaged (%s) and will be built anew", folder, ", ".join(damaged))
    return None


def _build(images: DecodedImages, folder: Path, settings: dict[str, Any]) -> None:
    """Write a cache beside its place and move it there: what bears the name is whole."""
    shape = (len(images), images.channels, images.image_size, images.image_size)
    need, free = int(np.prod(shape)), shutil.disk_usage(folder.parent).free
    if need > 0.98 * free:
        raise ValueError(
            f"the cache of {images.source.name} needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in "
            f"{folder.parent}; change paths.cache_dir, or decode on the fly with data.dataset.cache_dir=null"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed; the lock is ours
    partial.mkdir()
    try:
        meta = {**settings, "source": images.source.name, "count": len(images), "classes": list(images.classes)}
        _write(partial / "labels.npy", images.labels.numpy().shape, np.int64, [images.labels.numpy()])
        meta |= _write_images(images, partial / "images.npy", shape)
        meta["sha256"]["labels"] = hashlib.sha256(images.labels.numpy().tobytes()).hexdigest()
        meta["bytes"] = {name: (partial / name).stat().st_size for name in ARRAYS}
        with (partial / "meta.json").open("w") as file:
            json.dump(meta, file, indent=2)
            _sync(file)
        if folder.exists():
            shutil.rmtree(folder)  # damaged
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_images(images: DecodedImages, path: Path, shape: tuple[int, ...]) -> dict[str, Any]:
    """Decode with threads and write block by block; mean, std and checksum come from the same pass."""
    digest, histograms = hashlib.sha256(), []
    size = max(64, _BLOCK_BYTES // int(np.prod(shape[1:])))

    def decode(indices: range) -> np.ndarray:
        return np.stack([images.decode(index) for index in indices])

    def blocks() -> Iterator[np.ndarray]:
        what = f"caching {images.source.name}"
        with ThreadPoolExecutor(os.cpu_count()) as pool, counting(what, len(images)) as advance:
            for start in range(0, len(images), size):
                # Several a task: with small images, threads would spend their time handing over.
                tasks = range(start, min(start + size, len(images)))
                parts = [tasks[i : i + _TASK] for i in range(0, len(tasks), _TASK)]
                block = np.concatenate(list(pool.map(decode, parts)))
                digest.update(block.data)
                histograms.append(histogram(block))
                advance(len(block))
                yield block

    _write(path, shape, np.uint8, blocks())
    mean, std = mean_and_std(histograms)
    return {"mean": mean, "std": std, "sha256": {"images": digest.hexdigest()}}


def _write(path: Path, shape: tuple[int, ...], dtype: type, blocks: Any) -> None:
    """An .npy file from its blocks. Plain writes: a full disk is then an error, where a mapped file would crash."""
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _describe(crop: Crop) -> Any:
    """A crop in the key: its name, and the settings of a partial function."""
    inner = getattr(crop, "func", crop)
    name = f"{inner.__module__}.{inner.__qualname__}"
    settings: Sequence[Any] = [repr(getattr(crop, "args", ())), repr(sorted(getattr(crop, "keywords", {}).items()))]
    return [name, *settings]
