"""Batches of drawn images on disk, so that an interrupted command goes on where it was.

Batch k holds the images k * batch_size to (k + 1) * batch_size - 1. It counts when all of its files are whole; each is
written beside and renamed. A manifest says which settings determine the images: no others are mixed with them.
"""

from __future__ import annotations

import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from consistency.data.image_files import MANIFEST, npz_note, save_npz, save_png, to_nhwc
from consistency.io.atomic import atomic_replace, write_text
from consistency.io.run_dir import locked
from consistency.io.safe_load import read_json

_FLAT = 10_000  # images; more of them get a folder for every thousand
_END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"
_PATIENCE = 5.0  # seconds for another process to let go


@dataclass(frozen=True)
class Shards(ABC):
    """Where batches go: a folder, and how many images there shall be.

    Args:
        folder: Of the files and the manifest.
        num_samples: Of all batches.
        batch_size: Of each but the last.
        image_shape: (C, H, W).
    """

    folder: Path
    num_samples: int
    batch_size: int
    image_shape: tuple[int, int, int]

    def indices(self, batch: int) -> range:
        """Numbers of the images of a batch."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.num_samples))

    def missing(self) -> list[int]:
        """Batches that are not there, or not whole."""
        return [k for k in range(math.ceil(self.num_samples / self.batch_size)) if not self.is_there(k)]

    @abstractmethod
    def is_there(self, batch: int) -> bool:
        """Whether all of a batch is on disk."""

    @abstractmethod
    def write(self, batch: int, images: Tensor) -> None:
        """Put a batch of uint8 images [B, C, H, W] on disk."""


class PngShards(Shards):
    """One PNG an image: `00000.png`, or `12000/12345.png` where there are more than 10,000."""

    def is_there(self, batch: int) -> bool:
        """Whether every PNG of a batch is there to its end: after a power cut a file may be empty or cut short."""
        return all(_ends_as_png(self._path(index)) for index in self.indices(batch))

    def write(self, batch: int, images: Tensor) -> None:
        """Write the PNGs of a batch."""
        for index, image in zip(self.indices(batch), images, strict=True):
            save_png(image, self._path(index))

    def _path(self, index: int) -> Path:
        width = max(5, len(str(self.num_samples - 1)))  # names sort as numbers do
        within = f"{index - index % 1000:0{width}d}" if self.num_samples > _FLAT else ""
        return self.folder / within / f"{index:0{width}d}.png"


class RawShards(Shards):
    """One file of bytes [B, H, W, C] a batch, from which an `.npz` is made at the end."""

    def is_there(self, batch: int) -> bool:
        """Whether the file has its size."""
        path = self._path(batch)
        return path.exists() and path.stat().st_size == len(self.indices(batch)) * math.prod(self.image_shape)

    def write(self, batch: int, images: Tensor) -> None:
        """Write the file of a batch."""
        path = self._path(batch)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(to_nhwc(images).tobytes())
        atomic_replace(partial, path)

    def save(self, path: Path, labels: Tensor | None, note: str) -> None:
        """Make the `.npz` of all batches, one in memory at a time."""
        count, (channels, height, width) = math.ceil(self.num_samples / self.batch_size), self.image_shape
        parts = (self._path(batch).read_bytes() for batch in range(count))
        save_npz(parts, (self.num_samples, height, width, channels), labels, path, note=note)

    def _path(self, batch: int) -> Path:
        return self.folder / f"{batch:07d}.bin"


@contextmanager
def claimed(shards: Shards, out: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """This process alone works in the folder, which is new, or of the same settings.

    Args:
        shards: In a folder that need not exist.
        out: What the user calls it.
        settings: All that determines the images, as plain values.

    Raises:
        ValueError: if there is something else in the folder, or images of other settings.
        TimeoutError: if another process works there.
    """
    folder = shards.folder
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={out} is a file without an ending; name a folder, or end it in .png or .npz")
    others = _entries(folder, partials=True)
    if others and not (folder / MANIFEST).exists():
        raise ValueError(f"out={out}: {folder} is a folder that is not empty; name a new one")
    with locked(folder / MANIFEST, patience=_PATIENCE):
        try:
            if (folder / MANIFEST).exists() and _entries(folder):  # with no image in it, nothing can be mixed
                check_same(settings, read_json(folder / MANIFEST), out)
            for partial in folder.glob("**/.*.partial"):  # of a process that was killed
                partial.unlink(missing_ok=True)
            if shards.missing():
                write_text(folder / MANIFEST, manifest(settings, finished=False))
            yield
        finally:
            (folder / f".{MANIFEST}.lock").unlink(missing_ok=True)


def finish_pngs(shards: PngShards, settings: Mapping[str, Any]) -> None:
    """Say in the manifest that nothing is missing: readers refuse a folder that is not finished."""
    write_text(shards.folder / MANIFEST, manifest(settings, finished=True))


def finish_npz(shards: RawShards, path: Path, labels: Tensor | None, settings: Mapping[str, Any]) -> None:
    """Make the `.npz`, with the manifest as a note in it, and remove the batches."""
    shards.save(path, labels, manifest(settings, finished=True))
    shutil.rmtree(shards.folder, ignore_errors=True)


def is_finished_npz(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the `.npz` is there, made with these settings.

    Raises:
        ValueError: if there is another file.
    """
    if not path.exists():
        return False
    if (note := npz_note(path)) is None:
        raise ValueError(f"out={path} exists, and consistency-sample did not make it; name a new file")
    check_same(settings, note, path)
    return True


def manifest(settings: Mapping[str, Any], *, finished: bool) -> str:
    """The text of the manifest; nothing in it depends on when, where or in how many sessions the images were drawn."""
    content = {"made_by": "consistency-sample", "finished": finished, "settings": dict(settings)}
    return json.dumps(content, indent=1) + "\n"


def check_same(settings: Mapping[str, Any], found: Any, out: Path) -> None:
    """Refuse other settings than those of a manifest.

    Raises:
        ValueError: with the first that differs.
    """
    there = found.get("settings") if isinstance(found, dict) else None
    if not isinstance(there, dict):
        raise ValueError(f"out={out} holds a {MANIFEST} that does not say how its images were drawn; name a new out")
    here, there = _flat(json.loads(json.dumps(dict(settings)))), _flat(there)
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            raise ValueError(
                f"out={out} holds images of other settings: {name} is {_short(here.get(name))} now, "
                f"{_short(there.get(name))} there; name a new out, or delete the old images"
            )


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{"sampler": {"num_steps": 18}} -> {"sampler.num_steps": 18}: names as a person types them."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]}..."


def _entries(folder: Path, *, partials: bool = False) -> list[Path]:
    """What is in a folder beside the manifest, its lock, and (unless `partials`) files that were never finished."""
    if not folder.is_dir():
        return []
    own = (MANIFEST, f".{MANIFEST}.lock")
    return [path for path in folder.iterdir() if path.name not in own and (partials or not _is_partial(path.name))]


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(".partial")


def _ends_as_png(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-len(_END_OF_PNG), 2)
            return file.read() == _END_OF_PNG
    except OSError:  # not there, or shorter
        return False
