"""Sources that a library downloads: CIFAR-10 and flowers-102 through torchvision, Hugging Face's through `datasets`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from consistency.data.sources import MAX_CLASSES, Files
from consistency.io.safe_load import first_line

log = logging.getLogger(__name__)

# Checksums of what torchvision downloads and verifies.
_CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"
_FLOWERS_MD5 = {
    "102flowers.tgz": "52808999861908f626f3c1f4e79d11fa",
    "imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
    "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c",
}


class Cifar10:
    """CIFAR-10's 50,000 training images (or 10,000 test images). Read only when something asks for an image.

    Args:
        root: Folder of `cifar-10-python.tar.gz` or of what is in it; where it is downloaded to if it is not there.
        train: The training images; False for the test images.

    Raises:
        ValueError: if the archive is neither there nor to be had, on first use.
    """

    name = "cifar10"

    def __init__(self, root: str | Path, *, train: bool = True) -> None:
        self.root, self.train = Path(root), train

    @cached_property
    def _set(self) -> Any:
        from torchvision.datasets import CIFAR10

        return _downloaded(
            lambda: CIFAR10(str(self.root), train=self.train, download=True),
            f"CIFAR-10 is not in {self.root}",
            "put cifar-10-python.tar.gz there, or change data.dataset.root",
            {self.root / "cifar-10-python.tar.gz": _CIFAR10_MD5},
        )

    @property
    def classes(self) -> Sequence[str]:
        """airplane, ..., truck."""
        return self._set.classes

    @property
    def labels(self) -> Sequence[int]:
        """One an image."""
        return self._set.targets

    def __len__(self) -> int:
        return 50_000 if self.train else 10_000

    def open(self, index: int) -> Image.Image:
        """The image."""
        return Image.fromarray(self._set.data[index])

    def describe(self, index: int) -> str:
        """Its number."""
        return f"{self.root}: image {index}"

    def fingerprint(self) -> str:
        """The checksum of the archive, which torchvision verifies."""
        return f"md5 {_CIFAR10_MD5}, {'train' if self.train else 'test'}"


class Flowers102:
    """All 8,189 images of flowers-102 (training, validation and test), 102 classes, in the order of their numbers.

    torchvision downloads and verifies the archives, when something asks for an image; labels are those of
    `imagelabels.mat`, less one.

    Args:
        root: Folder of `flowers-102/`; where it is downloaded to if it is not there.

    Raises:
        ValueError: if the set is neither there nor to be had, on first use.
    """

    name = "flowers102"

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @cached_property
    def _files(self) -> Files:
        from scipy.io import loadmat
        from torchvision.datasets import Flowers102 as Verified

        folder = self.root / "flowers-102"
        verified = _downloaded(
            lambda: Verified(str(self.root), download=True),
            f"flowers-102 is not in {self.root}",
            f"put {', '.join(_FLOWERS_MD5)} into {folder}, or change data.dataset.root",
            {folder / name: md5 for name, md5 in _FLOWERS_MD5.items()},
        )
        files = Files(folder / "jpg")
        labels = loadmat(folder / "imagelabels.mat", squeeze_me=True)["labels"]
        if len(labels) != len(files):
            raise ValueError(f"{files.root} holds {len(files)} images, not {len(labels)}; unpack 102flowers.tgz anew")
        files.labels = [int(label) - 1 for label in labels]
        files.classes = list(getattr(verified, "classes", map(str, range(102))))
        return files

    @property
    def classes(self) -> Sequence[str]:
        """pink primrose, ..., blackberry lily."""
        return self._files.classes

    @property
    def labels(self) -> Sequence[int]:
        """One an image."""
        return self._files.labels

    def __len__(self) -> int:
        return len(self._files)

    def open(self, index: int) -> Image.Image:
        """The image."""
        return self._files.open(index)

    def describe(self, index: int) -> str:
        """Its file."""
        return self._files.describe(index)

    def fingerprint(self) -> str:
        """The checksum of the archive, which torchvision verifies."""
        return f"md5 {_FLOWERS_MD5['102flowers.tgz']}"


class HuggingFace:
    """A set of Hugging Face's hub or of a local folder, through `datasets` (extra `hf`).

    Args:
        name: `owner/name` on the hub, or a folder: one of `save_to_disk`, or files that `load_dataset` reads.
        split: E.g. train.
        config: Name of a part of the set, for sets that have several.
        image_column: Of the images; None for the only one of that type.
        label_column: Of the labels: integers from 0, or text, whose values, sorted, are the classes. None for the only
            one with class names, else one of integers or text that is called label or labels; no labels where there is
            none, or where it holds -1 (no label).

    Raises:
        ValueError: if the package, the set, the split or a column is missing.
    """

    def __init__(
        self,
        name: str,
        *,
        split: str = "train",
        config: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        if not name:
            raise ValueError("data.dataset.name is not set; owner/name of a set on the hub, or a folder")
        self.set_name, self.split = name, split
        self.name = Path(name).name
        self.rows = _load(name, split, config)
        import datasets

        self.image_column = image_column or self._only(datasets.Image, "image")
        self.label_column = label_column or self._find_labels(datasets.ClassLabel)
        for column in filter(None, (self.image_column, self.label_column)):
            if column not in self.rows.column_names:
                have = ", ".join(self.rows.column_names)
                option = "image_column" if column == self.image_column else "label_column"
                raise ValueError(f"{name} has no column {column}, but {have}; change data.dataset.{option}")
        if len(self.rows) == 0:
            raise ValueError(f"{name} [{split}] holds no images; change data.dataset.split")

    def _only(self, kind: type, what: str, optional: bool = False) -> str | None:
        found = [column for column, feature in self.rows.features.items() if isinstance(feature, kind)]
        if len(found) == 1 or (optional and not found):
            return found[0] if found else None
        have = ", ".join(self.rows.column_names)
        option = f"data.dataset.{what}_column"
        raise ValueError(f"{self.set_name} has {len(found)} {what} columns among {have}; set {option}")

    def _find_labels(self, named: type) -> str | None:
        kinds = {column: str(getattr(feature, "dtype", "")) for column, feature in self.rows.features.items()}
        fit = [c for c in ("label", "labels") if kinds.get(c, "").startswith(("int", "uint", "string", "large_string"))]
        column = self._only(named, "label", optional=True) or next(iter(fit), None)
        if column is not None and (bad := _no_labels(self.rows.with_format(None)[column][:])):
            what = "%s [%s]: column %s holds %s in %d of %d rows; labels are not used"
            log.warning(what, self.set_name, self.split, column, str(bad[0])[:40], len(bad), len(self.rows))
            return None
        return column

    @cached_property
    def _labels_and_classes(self) -> tuple[Sequence[int], Sequence[str]]:
        if self.label_column is None:
            return [0] * len(self.rows), []
        labels = self.rows.with_format(None)[self.label_column][:]
        if bad := _no_labels(labels):
            what = f"column {self.label_column} of {self.set_name} [{self.split}] does not hold labels"
            got = f"(integers from 0 to {MAX_CLASSES - 1:,}, or text) but {str(bad[0])[:40]}"
            raise ValueError(f"{what} {got}; change data.dataset.label_column")
        if isinstance(labels[0], str):
            classes = sorted(set(labels))
            numbers = {name: number for number, name in enumerate(classes)}
            return [numbers[label] for label in labels], classes
        names = getattr(self.rows.features[self.label_column], "names", None)
        return labels, names or [str(label) for label in range(max(labels) + 1)]

    @property
    def labels(self) -> Sequence[int]:
        """One an image."""
        return self._labels_and_classes[0]

    @property
    def classes(self) -> Sequence[str]:
        """Names, or numbers where the set has no names."""
        return self._labels_and_classes[1]

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, index: int) -> Image.Image:
        """The image."""
        return self.rows[index][self.image_column]

    def describe(self, index: int) -> str:
        """Set, split and row."""
        return f"{self.set_name} [{self.split}] row {index}"

    def fingerprint(self) -> str:
        """That of the library, and the columns."""
        return f"{self.rows._fingerprint} {self.image_column} {self.label_column}"


def _no_labels(labels: Sequence[Any]) -> list[Any]:
    """Those of a column that are no labels: integers from 0, or text."""
    if any(isinstance(label, str) for label in labels):
        return [label for label in labels if not isinstance(label, str)]
    return [label for label in labels if type(label) is not int or not 0 <= label < MAX_CLASSES]


def _load(name: str, split: str, config: str | None) -> Any:
    """The rows of a split."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError("Hugging Face's sets need a package: pip install 'consistency[hf]'") from error
    try:
        if not any(Path(name, file).exists() for file in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(name, config, split=split)
        rows = datasets.load_from_disk(name)
        if isinstance(rows, datasets.DatasetDict) and split not in rows:
            raise ValueError(f"it has {', '.join(rows)}")
        return rows[split] if isinstance(rows, datasets.DatasetDict) else rows
    except Exception as error:  # of a dozen kinds, and of three libraries
        advice = "check data.dataset.name and split, and the network (without one, HF_HUB_OFFLINE=1 saves the wait)"
        raise ValueError(f"{name} [{split}] cannot be loaded ({first_line(error)}); {advice}") from error


def _downloaded(make: Callable[[], Any], missing: str, advice: str, archives: Mapping[Path, str]) -> Any:
    """What torchvision makes, or one line that says what is missing or damaged; `archives` are files and their MD5."""
    try:
        return make()
    except (OSError, RuntimeError) as error:
        from torchvision.datasets.utils import check_integrity

        reason = first_line(error)
        for archive, md5 in archives.items():
            if archive.exists() and not check_integrity(str(archive), md5):
                what = f"{archive} is damaged (its MD5 is not {md5}) and cannot be downloaded anew ({reason})"
                raise ValueError(f"{what}; put a complete one in its place") from error
        raise ValueError(f"{missing} and cannot be downloaded ({reason}); {advice}") from error
