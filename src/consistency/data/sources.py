"""Where images come from: folders, zips, LMDB (`downloads` has more). Nothing is brought to a size here.

Handles are opened anew in each process, so loader workers may share a source.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from consistency.io.safe_load import first_line, parse_json

log = logging.getLogger(__name__)

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MAX_CLASSES = 1_000_000  # a label above it is a mistake, and a list of all classes would not fit into memory


class Source(Protocol):
    """Images of any sizes and modes with labels 0, 1, ...

    `open` returns an image that may not have been decoded yet; `describe` names it for messages; `fingerprint` changes
    with the content, and costs no reading of images. Sets without labels have label 0 everywhere and no classes.
    """

    name: str

    @property
    def classes(self) -> Sequence[str]: ...  # noqa: D102

    @property
    def labels(self) -> Sequence[int]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image: ...  # noqa: D102

    def describe(self, index: int) -> str: ...  # noqa: D102

    def fingerprint(self) -> str: ...  # noqa: D102


class Files:
    """Image files below a folder; by default those of a folder whose sub-folders, sorted by name, are the classes.

    Images below a sub-folder, at any depth, belong to its class. Without sub-folders there is no class. Hidden files
    and files that are no images by their ending are left out.

    Args:
        root: The folder.
        labelled: False: sub-folders mean nothing.

    Raises:
        ValueError: if there is no such folder, no image in it, or images both beside and in sub-folders.
    """

    def __init__(self, root: str | Path, *, labelled: bool = True) -> None:
        self.root = _existing(root)
        if not self.root.is_dir():
            raise ValueError(f"{root} is a file, not a folder of images; data=zip reads zips; change data.dataset.path")
        self.name = self.root.resolve().name
        self.names = sorted(_image_names(self.root), key=lambda name: name.split("/"))
        if not self.names:
            raise ValueError(f"{root} holds no images ({', '.join(ENDINGS)}); change data.dataset.path")
        tops = [name.partition("/")[0] if "/" in name else "" for name in self.names]
        self.classes = sorted(set(tops)) if labelled and set(tops) != {""} else []
        if "" in self.classes:
            beside = self.names[tops.index("")]
            raise ValueError(f"{root} has images in sub-folders (classes) and beside them ({beside}); move one kind")
        numbers = {top: number for number, top in enumerate(self.classes)}
        self.labels: Sequence[int] = [numbers.get(top, 0) for top in tops]

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int) -> Image.Image:
        """The image."""
        return _decoded((self.root / self.names[index]).read_bytes())

    def describe(self, index: int) -> str:
        """Its path."""
        return str(self.root / self.names[index])

    def fingerprint(self) -> str:
        """Of names, labels, sizes and times of change: reading 150 GB at each start would take an hour."""
        images = zip(self.names, self.labels, strict=True)
        stats = ((name, label, os.stat(f"{self.root}/{name}")) for name, label in images)
        return _hash((name, label, stat.st_size, stat.st_mtime_ns) for name, label, stat in stats)


class OneFile:
    """A single image file."""

    classes: Sequence[str] = ()
    labels: Sequence[int] = (0,)

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.stem

    def __len__(self) -> int:
        return 1

    def open(self, index: int) -> Image.Image:
        """The image."""
        return _decoded(self.path.read_bytes())

    def describe(self, index: int) -> str:
        """Its path."""
        return str(self.path)

    def fingerprint(self) -> str:
        """Of its name, size and time of change."""
        stat = self.path.stat()
        return _hash([(self.name, stat.st_size, stat.st_mtime_ns)])


def open_image(path: Path) -> Image.Image:
    """The image of a file of any of the kinds of `FORMATS`.

    Raises:
        ValueError: in one line, if there is none, or it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist, or is no file")
    try:
        return OneFile(path).open(0)
    except Exception as error:  # Pillow's decoders raise a dozen kinds of errors on damaged files
        raise ValueError(f"{path} cannot be read as an image") from error


class Zip:
    """Images in a zip, in any sub-folders, and optionally a `dataset.json` with `{"labels": [[name, label], ...]}`.

    The layout of EDM's and StyleGAN's dataset tools. Sub-folders are no classes there; labels go by name.

    Raises:
        ValueError: if it is no zip, holds no image, or lacks the label of an image.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _existing(path)
        if not self.path.is_file() or not zipfile.is_zipfile(self.path):
            raise ValueError(f"{path} is not a zip, or is cut short; change data.dataset.path")
        self.name, self._zip = self.path.stem, _PerProcess(partial(zipfile.ZipFile, self.path))
        try:
            infos = {info.filename: info for info in self._zip().infolist()}
        except Exception as error:  # zipfile raises a dozen kinds of errors on damaged files
            raise ValueError(f"{path} is a damaged zip ({first_line(error)}); change data.dataset.path") from error
        self.names = sorted(name for name in infos if _is_image(name))
        if not self.names:
            raise ValueError(f"{path} holds no images ({', '.join(ENDINGS)}); change data.dataset.path")
        self.labels: Sequence[int] = self._read_labels() if "dataset.json" in infos else []
        self.classes = [str(label) for label in range(max(self.labels) + 1)] if self.labels else []
        self.labels = self.labels or [0] * len(self.names)
        if nested := [name for name in infos if name.endswith("/dataset.json")]:
            log.warning("%s: %s is not read; labels belong into dataset.json at the top of the zip", path, nested[0])
        kept = [*self.names, *(["dataset.json"] if "dataset.json" in infos else [])]
        self._fingerprint = _hash((name, infos[name].file_size, infos[name].CRC) for name in kept)

    def _read_labels(self) -> list[int]:
        try:
            with self._zip().open("dataset.json") as file:
                pairs = parse_json(file.read(), self.path)["labels"]
            labels = {} if pairs is None else {str(name): label for name, label in pairs}
        except Exception as error:  # of zipfile, of its decompressors, of other contents
            raise ValueError(f'{self.path}: dataset.json is not {{"labels": [[name, label], ...]}}') from error
        if not labels:
            return []
        for name in self.names:
            if type(labels.get(name)) is not int or not 0 <= labels[name] < MAX_CLASSES:
                got = str(labels.get(name, "no label"))[:40]
                allowed = f"an integer from 0 to {MAX_CLASSES - 1:,}"
                raise ValueError(f"{self.path}: dataset.json has {got} for {name}; need {allowed}")
        if absent := sorted(labels.keys() - set(self.names)):
            what = "%s: dataset.json names %d images that are not in the zip, %s for one; they are left out"
            log.warning(what, self.path, len(absent), absent[0])
        return [labels[name] for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int) -> Image.Image:
        """The image."""
        return _decoded(self._zip().read(self.names[index]))

    def describe(self, index: int) -> str:
        """The zip and the name in it."""
        return f"{self.path}: {self.names[index]}"

    def fingerprint(self) -> str:
        """Of names, sizes and checksums in the zip's directory."""
        return self._fingerprint


class Lmdb:
    """An LMDB of encoded images, as LSUN comes: key -> JPEG or WebP. No labels. Needs the extra `lsun`.

    Raises:
        ValueError: if the package is missing, or the database is empty or damaged.
    """

    classes: Sequence[str] = ()

    def __init__(self, path: str | Path) -> None:
        self.path = _existing(path)
        self.name = self.path.resolve().name.removesuffix("_lmdb")
        self._env = _PerProcess(partial(_open_lmdb, self.path))
        self.count: int = self._env().stat()["entries"]
        if self.count == 0:
            raise ValueError(f"{path} is an empty database; change data.dataset.path")

    @cached_property
    def keys(self) -> np.ndarray:
        """All keys, in the order of the database; an array, because three million Python objects are slow to fork."""
        with self._env().begin(buffers=False) as transaction:
            return np.array(list(transaction.cursor().iternext(keys=True, values=False)), dtype=np.bytes_)

    @property
    def labels(self) -> Sequence[int]:
        """0 for all."""
        return np.zeros(self.count, dtype=np.int64)  # type: ignore[return-value]

    def __len__(self) -> int:
        return self.count

    def open(self, index: int) -> Image.Image:
        """The image."""
        with self._env().begin(buffers=False) as transaction:
            return _decoded(transaction.get(bytes(self.keys[index])))

    def describe(self, index: int) -> str:
        """The database and the key."""
        return f"{self.path}: key {bytes(self.keys[index]).decode(errors='replace')}"

    def fingerprint(self) -> str:
        """Of number, size and time of change."""
        stat = os.stat(self.path / "data.mdb")
        return _hash([(self.count, stat.st_size, stat.st_mtime_ns)])


class _PerProcess:
    """A handle that each process opens for itself: forked workers must share neither file position nor LMDB."""

    def __init__(self, open_it: Callable[[], Any]) -> None:
        self.open_it, self.pid = open_it, -1
        self.handle: Any = None

    def __call__(self) -> Any:
        if self.pid != os.getpid():
            if self.handle is not None:  # of the parent; LMDB opens no environment twice
                self.handle.close()
            self.pid, self.handle = os.getpid(), self.open_it()
        return self.handle

    def __getstate__(self) -> dict[str, Any]:
        return {"open_it": self.open_it, "pid": -1, "handle": None}


def _open_lmdb(path: Path) -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise ValueError("reading an LMDB needs a package: pip install 'consistency[lsun]'") from error
    try:
        environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        raise ValueError(f"{path} cannot be opened as an LMDB ({error}); unpack it anew") from error
    size = os.stat(path / "data.mdb").st_size
    need = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if size < need:  # LMDB maps the file: reading beyond its end would kill the process
        environment.close()
        raise ValueError(f"{path / 'data.mdb'} is cut short ({size:,} of {need:,} bytes); copy or unpack it anew")
    return environment


def _existing(path: str | Path | None) -> Path:
    if path is None:
        raise ValueError("data.dataset.path is not set; say where the images are")
    path = Path(str(path))  # a folder called 2024 arrives as a number
    if not path.exists():
        raise ValueError(f"{path} does not exist; change data.dataset.path, or see docs/data.md for what goes there")
    return path


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS) and not any(part.startswith(".") for part in name.split("/"))


def _image_names(root: Path) -> Iterable[str]:
    """Paths of the images below `root`, relative to it, with slashes."""
    visited = set()
    for folder, below, files in os.walk(root, followlinks=True):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in visited:  # a link to a folder above it
            below.clear()
            continue
        visited.add((place.st_dev, place.st_ino))
        inner = Path(folder).relative_to(root).as_posix()
        names = files if inner == "." else [f"{inner}/{file}" for file in files]
        yield from filter(_is_image, names)


def _decoded(data: bytes) -> Image.Image:
    """The image; decoded at once, so that errors come from here and no file stays open.

    Only formats of `ENDINGS`: Pillow would hand a PostScript file, whatever it is called, to an interpreter.
    """
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.load()
    return image


def _hash(facts: Iterable[tuple[Any, ...]]) -> str:
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(repr(fact).encode() + b"\n")
    return digest.hexdigest()
