import json
import shutil
import subprocess
import sys
import warnings
from collections import namedtuple
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from consistency.data import cache
from consistency.data.arrays import ImageError, histogram, mean_and_std
from consistency.data.cache import cached, read_meta
from consistency.data.cropping import adm, edm, exact


class Counting:
    """A source of noise images that counts how often it is read."""

    name, classes = "some noise/!", ["a", "b"]

    def __init__(self, count=10, size=8, seed=0):
        self.images = np.random.default_rng(seed).integers(256, size=(count, size, size, 3), dtype=np.uint8)
        self.labels = [index % 2 for index in range(count)]
        self.seed, self.reads = seed, 0

    def __len__(self):
        return len(self.images)

    def open(self, index):
        self.reads += 1
        return Image.fromarray(self.images[index])

    def describe(self, index):
        return f"image {index}"

    def fingerprint(self):
        return f"noise {self.seed}"


def build(folder, source=None, **options):
    settings = {"image_size": 8, "channels": 3, "crop": exact, "cache_dir": folder, **options}
    return cached(source or Counting(), **settings)


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_arrays(tmp_path):
    source = Counting()
    data = build(tmp_path / "new" / "cache", source)
    assert torch.equal(data.images, torch.from_numpy(source.images).permute(0, 3, 1, 2))
    assert (data.labels.tolist(), data.labels.dtype) == ([0, 1] * 5, torch.int64)
    assert data.classes == ("a", "b")
    assert data.folder.name.startswith("some_noise_-8x8-")
    assert visible(data.folder) == ["images.npy", "labels.npy", "meta.json"]
    assert visible(data.folder.parent) == [data.folder.name]
    # Any program can read it.
    assert np.array_equal(np.load(data.folder / "images.npy"), source.images.transpose(0, 3, 1, 2))


def test_meta(tmp_path):
    import hashlib

    source = Counting()
    meta = read_meta(build(tmp_path, source).folder)
    pixels = np.ascontiguousarray(source.images.transpose(0, 3, 1, 2))
    assert meta["sha256"]["images"] == hashlib.sha256(pixels.tobytes()).hexdigest()
    assert (meta["mean"], meta["std"]) == mean_and_std([histogram(pixels)])
    assert (meta["count"], meta["image_size"], meta["channels"], meta["classes"]) == (10, 8, 3, ["a", "b"])


def test_second_call_decodes_nothing(tmp_path):
    source = Counting()
    first = build(tmp_path, source)
    assert source.reads == 10
    second = build(tmp_path, source)
    assert source.reads == 10
    assert torch.equal(first.images, second.images)


def test_many_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_BLOCK_BYTES", 1)  # blocks of 64 images
    source = Counting(count=150)
    data = build(tmp_path, source)
    assert torch.equal(data.images, torch.from_numpy(source.images).permute(0, 3, 1, 2))
    assert read_meta(data.folder)["mean"] == pytest.approx(mean_and_std([histogram(data.images)])[0])


def test_each_setting_and_the_content_is_another_cache(tmp_path):
    settings = [
        {},
        {"image_size": 4, "crop": adm},
        {"crop": adm},
        {"crop": edm},
        {"crop": partial(adm)},  # as Hydra makes it: the same as adm
        {"channels": 1},
        {"limit": 5},
        {"source": Counting(seed=1)},
    ]
    folders = [build(tmp_path, **options).folder for options in settings]
    assert folders[2] == folders[4]
    assert len(set(folders)) == len(settings) - 1
    monkey_version = cache.VERSION
    try:
        cache.VERSION = -1
        assert build(tmp_path).folder not in folders
    finally:
        cache.VERSION = monkey_version


def test_mapped_without_a_warning_and_private(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = build(tmp_path)
    before = data.images.clone()
    data.images[0] = 0  # a private page, not the file
    assert torch.equal(build(tmp_path).images, before)


@pytest.mark.parametrize("damage", ["cut", "no labels", "no meta", "meta", "other meta"])
def test_damaged_cache_is_built_anew(tmp_path, damage, caplog):
    source = Counting()
    folder = build(tmp_path, source).folder
    if damage == "cut":
        content = (folder / "images.npy").read_bytes()
        (folder / "images.npy").write_bytes(content[:-1])
    elif damage == "no labels":
        (folder / "labels.npy").unlink()
    elif damage == "no meta":
        (folder / "meta.json").unlink()
    else:
        (folder / "meta.json").write_text("{" if damage == "meta" else "[]")
    data = build(tmp_path, source)
    assert source.reads == 20
    assert torch.equal(data.images, torch.from_numpy(source.images).permute(0, 3, 1, 2))
    assert "damaged" in caplog.text
    assert str(folder) in caplog.text


def test_what_a_killed_process_left_is_not_used(tmp_path):
    folder = build(tmp_path).folder
    folder.rename(folder.with_name(f".{folder.name}.partial"))
    source = Counting()
    build(tmp_path, source)
    assert source.reads == 10
    assert visible(tmp_path) == [folder.name]


def test_failed_build_leaves_nothing(tmp_path):
    source = Counting()
    source.open = lambda index: Image.new("RGB", (3, 3)) if index == 7 else Image.new("RGB", (8, 8))
    with pytest.raises(ImageError, match=r"^image 7 is 3x3, not 8x8"):
        build(tmp_path, source)
    assert visible(tmp_path) == []


@pytest.mark.parametrize("below", ["", "deeper"])
def test_file_in_the_place_of_the_folder(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file.* cannot be made a folder \(.*\); change paths\.cache_dir"):
        build(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "mine"


def test_full_disk_is_said_before_anything_is_decoded(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    source = Counting(count=1000, size=100)
    with pytest.raises(ValueError, match=r"needs 0\.0 GB, 0\.0 GB are free .*change paths\.cache_dir"):
        build(tmp_path, source, image_size=100)
    assert source.reads == 0


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_cache import Counting, build

class Slow(Counting):
    def open(self, index):
        time.sleep(0.05)
        return super().open(index)

source = Slow()
folder = Path(sys.argv[1])
(folder / sys.argv[2]).touch()
while not all((folder / name).exists() for name in "ab"):
    time.sleep(0.01)
data = build(folder / "cache", source)
print(source.reads, int(data.images.sum()))
"""


@pytest.mark.slow
def test_two_processes_build_once(tmp_path):
    code = CHILD.format(tests=str(__file__).rpartition("/")[0])
    command = [sys.executable, "-c", code, str(tmp_path)]
    children = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "ab"]
    said = [child.communicate(timeout=600)[0].split() for child in children]
    assert sorted(reads for reads, _ in said) == ["0", "10"]
    assert said[0][1] == said[1][1] == str(int(Counting().images.sum()))


def test_meta_is_plain_json(tmp_path):
    meta = json.loads((build(tmp_path, crop=partial(edm)).folder / "meta.json").read_text())
    assert meta["crop"][0] == "consistency.data.cropping.edm"
