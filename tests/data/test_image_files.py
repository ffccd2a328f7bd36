import numpy as np
import pytest
import torch
from PIL import Image

from consistency.data.image_files import (
    image_grid,
    is_grid,
    npz_note,
    read_images,
    save_gif,
    save_grid,
    save_npz,
    save_pngs,
    to_nhwc,
)


@pytest.fixture
def images():
    def make(count, channels=1, size=8):
        return torch.randint(256, (count, channels, size, size), dtype=torch.uint8)

    return make


def cell(picture, row, column, side):
    top, left = 2 + row * (side + 2), 2 + column * (side + 2)
    return picture[:, top : top + side, left : left + side]


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_row_by_row_with_whole_pixels(images, channels):
    some = images(5, channels)
    picture = image_grid(some)
    # 3 columns, 2 rows; 8 pixels become 32; a border of 2 around every cell.
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 2 + 2 * 34, 2 + 3 * 34)
    for index, image in enumerate(some):
        enlarged = cell(picture, index // 3, index % 3, 32)
        assert torch.equal(enlarged, image.expand(3, 8, 8).repeat_interleave(4, 1).repeat_interleave(4, 2))
    # Borders and the free place are white.
    assert (picture[:, :2] == 255).all()
    assert (picture[:, :, 34:36] == 255).all()
    assert (cell(picture, 1, 2, 32) == 255).all()


@pytest.mark.parametrize(("size", "side"), [(4, 32), (20, 40), (32, 32), (48, 48)])
def test_enlargement(images, size, side):
    assert image_grid(images(4, size=size)).shape == (3, 2 + 2 * (side + 2), 2 + 2 * (side + 2))


def test_columns_and_cell(images):
    assert image_grid(images(6), columns=6, min_cell=8).shape == (3, 12, 62)
    assert image_grid(images(6), columns=2, min_cell=8).shape == (3, 32, 22)


@pytest.mark.parametrize("channels", [1, 3])
def test_save_grid(images, tmp_path, channels):
    some, path = images(4, channels), tmp_path / "new" / "grid.png"
    save_grid(some, path)
    picture = Image.open(path)
    assert (picture.mode, picture.size) == ("RGB", (70, 70))
    assert np.array_equal(np.asarray(picture), image_grid(some).permute(1, 2, 0).numpy())
    save_grid(some, path, columns=4)
    assert Image.open(path).size == (138, 36)


def test_grids_know_that_they_are(images, tmp_path):
    save_grid(images(4), tmp_path / "grid.png")
    save_pngs(images(1), tmp_path / "new")
    (tmp_path / "text.png").write_text("no image")
    assert is_grid(tmp_path / "grid.png")
    assert not any(is_grid(tmp_path / name) for name in ("new/00000.png", "text.png", "new"))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_single_pngs(images, tmp_path, channels, mode):
    some = images(3, channels)
    save_pngs(some, tmp_path / "new")
    files = sorted((tmp_path / "new").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    for file, image in zip(files, some, strict=True):
        picture = Image.open(file)
        assert picture.mode == mode
        pixels = torch.from_numpy(np.array(picture)).view(8, 8, channels).permute(2, 0, 1)
        assert torch.equal(pixels, image)


def test_gif(images, tmp_path):
    frames = [images(4, 3) for _ in range(3)]
    save_gif(frames, tmp_path / "new" / "frames.gif")
    assert is_grid(tmp_path / "new" / "frames.gif")
    picture = Image.open(tmp_path / "new" / "frames.gif")
    assert (picture.n_frames, picture.size) == (3, (70, 70))
    for number, (frame, duration) in enumerate(zip(frames, (300, 300, 2000), strict=True)):
        picture.seek(number)
        assert picture.info["duration"] == duration
        shown = np.asarray(picture.convert("RGB")).astype(int)
        assert abs(shown - image_grid(frame).permute(1, 2, 0).numpy()).mean() < 8  # 256 colours
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["frames.gif"]


@pytest.mark.parametrize("channels", [1, 3])
def test_npz(images, tmp_path, channels):
    some, path = images(5, channels), tmp_path / "new" / "samples.npz"
    parts = [to_nhwc(part).tobytes() for part in some.split(2)]
    save_npz(parts, (5, 8, 8, channels), torch.arange(5), path, note='{"seed": 3}')
    with np.load(path) as stored:
        assert stored.files == ["arr_0", "arr_1"]
        assert stored["arr_0"].dtype == np.uint8
        assert stored["arr_0"].shape == (5, 8, 8, channels)
        assert np.array_equal(stored["arr_0"].transpose(0, 3, 1, 2), some.numpy())
        assert stored["arr_1"].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(read_images(path), some)
    assert npz_note(path) == {"seed": 3}
    assert [file.name for file in path.parent.iterdir()] == ["samples.npz"]


def test_npz_without_labels_or_note(images, tmp_path):
    path = tmp_path / "samples.npz"
    save_npz([to_nhwc(images(2)).tobytes()], (2, 8, 8, 1), None, path)
    with np.load(path) as stored:
        assert stored.files == ["arr_0"]
    assert npz_note(path) is None


def test_npz_of_too_few_bytes_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="lack 64 bytes"):
        save_npz([bytes(64)], (2, 8, 8, 1), None, tmp_path / "samples.npz")
    assert not (tmp_path / "samples.npz").exists()
