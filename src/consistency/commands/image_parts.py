"""Sampled images on disk while a command is under way, so that an interrupted command goes on where it was.

Every image is a PNG, written beside and renamed; an `.npz` is packed from them at the end. Batch k holds the images
k * batch_size to (k + 1) * batch_size - 1, and is sampled again unless all of its PNGs are complete. A manifest says
which settings determine the images: no others are mixed with them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from consistency.data.image_files import MANIFEST, npz_note, save_npz, save_png
from consistency.io.atomic import write_text
from consistency.io.nested import flatten
from consistency.io.run_dir import locked
from consistency.io.safe_load import read_json

_FLAT = 10_000  # images; more of them get a folder for every thousand
_END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"
_PATIENCE = 5.0  # seconds for another process to let go


@dataclass(frozen=True)
class ImageParts:
    """The PNGs `00000.png`, ... of a folder, or `12000/12345.png` where there are more than 10,000.

    Args:
        folder: Of the PNGs and the manifest; it need not exist.
        num_samples: How many images there shall be.
        batch_size: Images of each batch but the last.
    """

    folder: Path
    num_samples: int
    batch_size: int

    def indices(self, batch: int) -> range:
        """Numbers of the images of a batch."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.num_samples))

    def missing(self) -> list[int]:
        """Batches of which an image is missing or cut short, as after a power cut."""
        batches = range(math.ceil(self.num_samples / self.batch_size))
        return [k for k in batches if not all(_ends_as_png(self.path(index)) for index in self.indices(k))]

    def count_done(self, missing: Sequence[int]) -> int:
        """Images of all batches but the missing ones."""
        return self.num_samples - sum(len(self.indices(batch)) for batch in missing)

    def write(self, batch: int, images: Tensor) -> None:
        """Write the PNGs of a batch of uint8 images [B, C, H, W]."""
        for index, image in zip(self.indices(batch), images, strict=True):
            save_png(image, self.path(index))

    def path(self, index: int) -> Path:
        """Of one image; names sort as numbers do."""
        width = max(5, len(str(self.num_samples - 1)))
        within = f"{index - index % 1000:0{width}d}" if self.num_samples > _FLAT else ""
        return self.folder / within / f"{index:0{width}d}.png"


@contextmanager
def claimed(parts: ImageParts, out: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Lock the folder, which must be new or written with the same settings.

    Args:
        parts: In a folder that need not exist.
        out: What the user calls it.
        settings: All that determines the images, as plain values.

    Raises:
        ValueError: if there is something else in the folder, or images of other settings.
        TimeoutError: if another process works there.
    """
    folder = parts.folder
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={out} is a file without an ending; name a folder, or end it in .png or .npz")
    if _entries(folder, partials=True) and not (folder / MANIFEST).exists():
        raise ValueError(f"out={out}: {folder} is a folder that is not empty; name a new one")
    with locked(folder / MANIFEST, patience=_PATIENCE):
        try:
            if (folder / MANIFEST).exists() and _entries(folder):  # with no image in it, nothing can be mixed
                check_same(settings, read_json(folder / MANIFEST), out)
            if parts.missing():
                write_text(folder / MANIFEST, manifest(settings, finished=False))
            yield
        finally:
            (folder / f".{MANIFEST}.lock").unlink(missing_ok=True)


def finish_folder(parts: ImageParts, settings: Mapping[str, Any]) -> None:
    """Write into the manifest that no image is missing: readers refuse a folder that is not finished."""
    for partial in parts.folder.glob("**/.*.partial"):  # of a process that was killed
        partial.unlink(missing_ok=True)
    write_text(parts.folder / MANIFEST, manifest(settings, finished=True))


def finish_npz(parts: ImageParts, path: Path, labels: Tensor | None, settings: Mapping[str, Any]) -> None:
    """Pack the `.npz`, with the manifest as a note in it, and remove the PNGs."""
    from PIL import Image

    def pixels() -> Iterator[np.ndarray]:
        for index in range(parts.num_samples):
            with Image.open(parts.path(index)) as image:
                yield np.atleast_3d(np.asarray(image))

    shape = next(pixels()).shape
    images = (array.tobytes() for array in pixels())
    save_npz(images, (parts.num_samples, *shape), labels, path, note=manifest(settings, finished=True))
    shutil.rmtree(parts.folder, ignore_errors=True)


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
    """The text of the manifest; it does not depend on when, where or in how many sessions the images were sampled."""
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
    here, there = flatten(json.loads(json.dumps(dict(settings)))), flatten(there)
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            raise ValueError(
                f"out={out} holds images of other settings: {name} is {_short(here.get(name))} now, "
                f"{_short(there.get(name))} there; name a new out, or delete the old images"
            )


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
