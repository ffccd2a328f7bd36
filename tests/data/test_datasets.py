import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from consistency.data import datasets
from consistency.data.arrays import DecodedImages
from consistency.data.cropping import adm, edm, exact
from consistency.data.datasets import ImageArray, digits, hugging_face, image_folder, image_zip, lsun
from consistency.data.sources import Files


def test_items_and_batches():
    images = torch.arange(5 * 3 * 2 * 2, dtype=torch.uint8).view(5, 3, 2, 2)
    data = ImageArray(images, torch.arange(5) * 10)
    assert len(data) == 5
    image, label = data[3]
    assert torch.equal(image, images[3])
    assert int(label) == 30
    batch, labels = data.__getitems__([4, 0, 4])
    assert torch.equal(batch, images[[4, 0, 4]])
    assert labels.tolist() == [40, 0, 40]


def test_pytorch_reads_a_batch_in_one_call():
    data = ImageArray(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4))
    loader = DataLoader(data, batch_sampler=[[2, 1]], collate_fn=lambda batch: batch)
    ((images, labels),) = loader
    assert images.shape == (2, 1, 2, 2)
    assert labels.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2), "uint8"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2), r"\[2, 4, 4\]"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3), "2 images and 3 labels"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, 1), "labels"),
        (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), torch.zeros(0), "at least one"),
    ],
)
def test_refuses(images, labels, words):
    with pytest.raises(ValueError, match=words):
        ImageArray(images, labels)


def test_digits():
    data = digits()
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == torch.uint8
    # 17 grey levels over the whole range.
    assert data.images.unique().tolist() == [round(level * 255 / 16) for level in range(17)]
    assert data.labels.dtype == torch.int64
    assert data.labels.unique().tolist() == list(range(10))


def test_digits_limit():
    few = digits(limit=7)
    assert len(few) == len(few.labels) == 7
    assert torch.equal(few.images, digits().images[:7])


@pytest.fixture
def folder(tmp_path):
    """Two classes of colour images 10x8."""
    for index in range(6):
        pixels = np.random.default_rng(index).integers(256, size=(8, 10, 3), dtype=np.uint8)
        path = tmp_path / "set" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "set"


def pack(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        names = Files(folder).names
        for name in names:
            archive.write(folder / name, name)
        labels = [[name, "ab".index(name[0])] for name in reversed(names)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def all_of(data):
    items = [data[index] for index in range(len(data))]
    return torch.stack([image for image, _ in items]), [int(label) for _, label in items]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", [adm, edm])
def test_on_the_fly_equals_the_cache(folder, tmp_path, channels, crop):
    settings = {"image_size": 4, "channels": channels, "crop": crop}
    fly, kept = (image_folder(folder, **settings, cache_dir=where) for where in (None, tmp_path / "cache"))
    assert (type(fly), type(kept)) == (DecodedImages, ImageArray)
    images, labels = all_of(fly)
    assert torch.equal(images, kept.images)
    assert labels == kept.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert fly.classes == kept.classes == ("a", "b")
    assert images.shape == (6, channels, 4, 4)


def test_zip_equals_folder(folder, tmp_path):
    settings = {"image_size": 4, "crop": adm, "cache_dir": tmp_path / "cache"}
    a, b = image_folder(folder, **settings), image_zip(pack(folder), **settings)
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.labels, b.labels)
    assert a.folder != b.folder


def test_crops_by_default(folder, tmp_path):
    """Folders are cropped as ADM did; zips must have the right size."""
    assert torch.equal(image_folder(folder, image_size=4)[0][0], image_folder(folder, image_size=4, crop=adm)[0][0])
    with pytest.raises(ValueError, match="is 10x8, not 4x4"):
        image_zip(pack(folder), image_size=4, cache_dir=tmp_path / "cache")


def test_lsun_folder_has_no_classes(folder):
    data = lsun(folder, image_size=8, crop=adm)
    assert (data.labels.tolist(), data.classes, data[0][0].shape) == ([0] * 6, (), (3, 8, 8))


def test_other_labels_are_another_cache(folder, tmp_path):
    settings = {"image_size": 8, "cache_dir": tmp_path / "cache"}
    assert image_folder(folder, **settings).labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert lsun(folder, **settings).labels.tolist() == [0] * 6


def test_hugging_face_equals_folder(folder, tmp_path):
    library = pytest.importorskip("datasets")
    source = Files(folder)
    pictures = [Image.open(folder / name).copy() for name in source.names]
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["a", "b"])})
    rows = library.Dataset.from_dict({"image": pictures, "label": source.labels}, features=features)
    rows.save_to_disk(str(tmp_path / "saved"))
    data = hugging_face(str(tmp_path / "saved"), image_size=4, cache_dir=tmp_path / "cache")
    same = image_folder(folder, image_size=4, cache_dir=tmp_path / "cache")
    assert torch.equal(data.images, same.images)
    assert torch.equal(data.labels, same.labels)
    assert data.classes == same.classes


def test_sets_of_torchvision_go_through_the_same_cache(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "Cifar10", lambda root, train: asked.append((root, train)) or Files(folder))
    monkeypatch.setattr(datasets, "Flowers102", lambda root: asked.append(root) or Files(folder))
    a = datasets.cifar10("r", train=False, image_size=8, crop=adm, cache_dir=tmp_path)
    b = datasets.flowers102("s", image_size=8, cache_dir=tmp_path, limit=2)
    assert (len(a), len(b), asked) == (6, 2, [("r", False), "s"])
    with pytest.raises(ValueError, match="is 10x8, not 32x32"):
        datasets.cifar10("r", crop=exact)[0]
