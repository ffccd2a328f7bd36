import sys
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from PIL import Image

from consistency.data.downloads import Cifar10, Flowers102, HuggingFace


class TestCifar10:
    @pytest.fixture
    def stand_in(self, monkeypatch):
        """torchvision's class, with four images; says what it was asked for."""
        asked = []

        def make(root, train, download):
            asked.append((root, train, download))
            data = np.arange(4 * 32 * 32 * 3).reshape(4, 32, 32, 3).astype(np.uint8)
            return SimpleNamespace(data=data, targets=[3, 1, 0, 2], classes=["a", "b", "c", "d"])

        monkeypatch.setattr(torchvision.datasets, "CIFAR10", make)
        return asked

    def test_images(self, stand_in, tmp_path):
        source = Cifar10(tmp_path)
        assert np.asarray(source.open(2)).tolist() == stand_in_image(2)
        assert (list(source.labels), list(source.classes)) == ([3, 1, 0, 2], ["a", "b", "c", "d"])
        assert stand_in == [(str(tmp_path), True, True)]
        assert "image 2" in source.describe(2)

    def test_nothing_is_read_for_a_cache_that_is_there(self, stand_in, tmp_path):
        train, test = Cifar10(tmp_path), Cifar10(tmp_path, train=False)
        assert (len(train), len(test)) == (50_000, 10_000)
        assert train.fingerprint() == Cifar10("elsewhere").fingerprint() != test.fingerprint()
        assert stand_in == []

    @pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("File not found or corrupted.")])
    def test_missing_download(self, monkeypatch, tmp_path, error):
        def fail(*args, **options):
            raise error

        monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
        with pytest.raises(ValueError, match=r"CIFAR-10 is not in .* cannot be downloaded") as caught:
            _ = Cifar10(tmp_path).labels
        assert "cifar-10-python.tar.gz" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_damaged_download(self, monkeypatch, tmp_path):
        def fail(*args, **options):
            raise URLError("no network")

        monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half")
        with pytest.raises(ValueError, match=r"tar\.gz is damaged \(its MD5 .* put a complete one in its place$"):
            _ = Cifar10(tmp_path).labels


def stand_in_image(index):
    return np.arange(4 * 32 * 32 * 3).reshape(4, 32, 32, 3).astype(np.uint8)[index].tolist()


class TestFlowers:
    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        """Three images as torchvision unpacks them; classes 102, 1, 7."""
        from scipy.io import savemat

        folder = tmp_path / "flowers-102"
        (folder / "jpg").mkdir(parents=True)
        for number in (1, 2, 3):
            Image.new("RGB", (9, 6), (number * 50, 0, 0)).save(folder / "jpg" / f"image_{number:05d}.jpg", quality=100)
        savemat(folder / "imagelabels.mat", {"labels": np.array([[102, 1, 7]])})
        monkeypatch.setattr(torchvision.datasets, "Flowers102", lambda root, download: SimpleNamespace())
        return tmp_path

    def test_all_images_in_the_order_of_their_numbers(self, root):
        source = Flowers102(root)
        assert (source.name, len(source), len(source.classes)) == ("flowers102", 3, 102)
        assert list(source.labels) == [101, 0, 6]
        assert [round(np.asarray(source.open(i))[0, 0, 0] / 50) for i in range(3)] == [1, 2, 3]

    def test_missing_images(self, root):
        (root / "flowers-102" / "jpg" / "image_00002.jpg").unlink()
        with pytest.raises(ValueError, match="holds 2 images, not 3"):
            len(Flowers102(root))

    def test_missing_download(self, monkeypatch, tmp_path):
        def fail(*args, **options):
            raise URLError("no network")

        monkeypatch.setattr(torchvision.datasets, "Flowers102", fail)
        with pytest.raises(ValueError, match=r"flowers-102 is not in .* put 102flowers\.tgz"):
            len(Flowers102(tmp_path))


class TestHuggingFace:
    @pytest.fixture
    def datasets(self):
        return pytest.importorskip("datasets")

    @pytest.fixture
    def saved(self, datasets, tmp_path):
        """A set of three images with classes, a column of numbers and one of text."""
        columns = {
            "picture": [Image.new("RGB", (4, 4), (level, 0, 0)) for level in (10, 20, 30)],
            "kind": [2, 0, 1],
            "number": [5, 4, 3],
            "text": ["b", "a", "b"],
            "half": [0.5, 1.5, 2.5],
            "gaps": [-1, 0, 1],
        }
        kinds = {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["x", "y", "z"]),
            "number": datasets.Value("int64"),
            "text": datasets.Value("string"),
            "half": datasets.Value("float32"),
            "gaps": datasets.Value("int64"),
        }
        rows = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "set"))
        return tmp_path / "set"

    def test_columns_are_found_by_their_type(self, saved):
        source = HuggingFace(str(saved))
        assert (len(source), source.name, source.image_column, source.label_column) == (3, "set", "picture", "kind")
        assert (list(source.labels), list(source.classes)) == ([2, 0, 1], ["x", "y", "z"])
        assert [np.asarray(source.open(i))[0, 0, 0] for i in range(3)] == [10, 20, 30]
        assert source.describe(1) == f"{saved} [train] row 1"

    def test_columns_by_name(self, saved):
        source = HuggingFace(str(saved), label_column="number")
        assert (list(source.labels), list(source.classes)) == ([5, 4, 3], ["0", "1", "2", "3", "4", "5"])

    def test_text_labels_are_classes(self, saved):
        source = HuggingFace(str(saved), label_column="text")
        assert (list(source.labels), list(source.classes)) == ([1, 0, 1], ["a", "b"])

    @pytest.mark.parametrize(
        ("column", "labels", "said"),
        [
            ([3, 0, 1], [3, 0, 1], ""),
            (["y", "x", "y"], [1, 0, 1], ""),
            ([-1, 0, 1], [0, 0, 0], "column label holds -1 in 1 of 3 rows; labels are not used"),
            (["y", None, "y"], [0, 0, 0], "column label holds None in 1 of 3 rows; labels are not used"),
            ([0.5, 1.0, 2.0], [0, 0, 0], ""),
        ],
    )
    def test_plain_column_called_label(self, datasets, saved, tmp_path, caplog, column, labels, said):
        rows = datasets.load_from_disk(str(saved))["train"].remove_columns(["kind"]).add_column("label", column)
        rows.save_to_disk(str(tmp_path / "plain"))
        source = HuggingFace(str(tmp_path / "plain"))
        assert list(source.labels) == labels
        assert said in caplog.text
        assert bool(said) == ("not used" in caplog.text)

    def test_splits_and_fingerprints(self, saved):
        train, test = HuggingFace(str(saved)), HuggingFace(str(saved), split="test")
        assert (len(test), test.labels) == (1, [0])
        assert HuggingFace(str(saved)).fingerprint() == train.fingerprint()
        others = [test, HuggingFace(str(saved), label_column="number")]
        assert len({train.fingerprint(), *(source.fingerprint() for source in others)}) == 3

    def test_folder_of_images(self, datasets, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        for name in ("cat", "dog"):
            (tmp_path / "images" / "train" / name).mkdir(parents=True)
            Image.new("L", (4, 4)).save(tmp_path / "images" / "train" / name / "0.png")
        source = HuggingFace(str(tmp_path / "images"))
        assert (list(source.classes), list(source.labels)) == (["cat", "dog"], [0, 1])

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"split": "nope"}, r"\[nope\] cannot be loaded \(it has train, test\)"),
            ({"label_column": "colour"}, r"no column colour, but picture, .*change data\.dataset\.label_column"),
            ({"image_column": "colour"}, r"no column colour, but picture, .*change data\.dataset\.image_column"),
            (
                {"label_column": "half"},
                r"column half of .* does not hold labels .* but 0\.5; change data\.dataset\.",
            ),
            ({"label_column": "gaps"}, r"column gaps of .* does not hold labels .* but -1; change"),
        ],
    )
    def test_wrong_options(self, saved, options, words):
        with pytest.raises(ValueError, match=words):
            _ = HuggingFace(str(saved), **options).labels

    def test_without_a_network_is_one_line(self, datasets, monkeypatch):
        def unreachable(*_, **__):
            raise ConnectionError("no route to host\nand more")

        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        with pytest.raises(ValueError, match=r"owner/set \[train\] .* \(no route to host\).* network") as caught:
            HuggingFace("owner/set")
        assert "\n" not in str(caught.value)

    def test_missing_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ValueError, match=r"pip install 'consistency\[hf\]'"):
            HuggingFace("owner/set")
