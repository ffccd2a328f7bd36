import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from consistency.data.arrays import DecodedImages, ImageError, histogram, mean_and_std, spread
from consistency.data.cropping import adm, exact
from consistency.data.sources import Files


@pytest.fixture
def folder(tmp_path):
    for index in range(4):
        pixels = np.random.default_rng(index).integers(256, size=(6, 8, 3), dtype=np.uint8)
        path = tmp_path / "set" / f"class{index // 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "set"


def decoded(folder, **options):
    return DecodedImages(Files(folder), **{"image_size": 6, "channels": 3, "crop": adm, **options})


def test_items(folder):
    data = decoded(folder)
    image, label = data[3]
    assert (image.shape, image.dtype, label) == ((3, 6, 6), torch.uint8, 1)
    pixels = np.asarray(Image.open(folder / "class1" / "3.png"))[:, 1:7]
    assert torch.equal(image, torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    assert decoded(folder, channels=1)[0][0].shape == (1, 6, 6)
    assert (data.labels.tolist(), data.classes) == ([0, 0, 1, 1], ("class0", "class1"))


def test_limit_takes_of_all_classes(folder):
    data = decoded(folder, limit=2)
    assert (len(data), data.labels.tolist()) == (2, [0, 1])
    assert torch.equal(data[1][0], decoded(folder)[2][0])
    assert len(decoded(folder, limit=9)) == 4


@pytest.mark.parametrize(("count", "limit"), [(10, 10), (10, 3), (7, 6), (5, None), (3, 8)])
def test_spread(count, limit):
    indices = spread(count, limit)
    assert len(set(indices.tolist())) == len(indices) == min(count, limit or count)
    assert (indices[0], np.diff(indices).max(initial=1)) <= (0, -(-count // len(indices)))
    assert indices.max() < count


@pytest.mark.parametrize("options", [{"limit": 0}, {"channels": 2}, {"channels": 4}])
def test_refuses(folder, options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))} must be .*change data\."):
        decoded(folder, **options)


@pytest.mark.parametrize("damage", ["cut", "nonsense", "empty", "deleted"])
def test_corrupt_image_is_one_line_with_its_name(folder, damage):
    file, data = folder / "class1" / "2.png", decoded(folder)
    content = {"cut": file.read_bytes()[:80], "nonsense": b"no image" * 20, "empty": b"", "deleted": b""}[damage]
    file.write_bytes(content)
    if damage == "deleted":
        file.unlink()
    with pytest.raises(ImageError) as caught:
        data[2]
    assert str(caught.value).startswith(f"{file} cannot be read as an image (")
    assert len(str(caught.value).splitlines()) == 1


def test_wrong_size_names_the_file(folder):
    with pytest.raises(ImageError, match=r"class0/0\.png is 8x6, not 6x6; change data\.image_size"):
        decoded(folder, crop=exact)[0]


def test_loader_workers_pass_the_line_on(folder):
    (folder / "class0" / "1.png").write_bytes(b"nonsense")
    with pytest.raises(ImageError) as caught:
        list(DataLoader(decoded(folder), batch_size=2, num_workers=1))
    line = f"{folder}/class0/1.png cannot be read as an image (UnidentifiedImageError); replace the file or take it out"
    assert str(caught.value) == line


@pytest.mark.parametrize("channels", [1, 3])
def test_mean_and_std(channels):
    images = torch.randint(256, (20, channels, 5, 4), dtype=torch.uint8)
    mean, std = mean_and_std(histogram(part) for part in images.split(7))
    floats = images.double().div(255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(floats.mean(1).tolist(), abs=1e-12)
    assert std == pytest.approx(floats.std(1, correction=0).tolist(), abs=1e-12)
