import numpy as np
import pytest
from PIL import Image

from consistency.data.cropping import adm, edm, exact, with_channels


def ramp(width, height):
    """Red grows to the right, green downwards: a crop's place can be read from its pixels."""
    x = np.broadcast_to(np.arange(width), (height, width))
    y = np.broadcast_to(np.arange(height)[:, None], (height, width))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


def pixels(image):
    return np.asarray(image).astype(float)


@pytest.mark.parametrize(
    ("width", "height", "tolerance"),
    # Pillow's box takes whole pixels, so odd sides are less exact; a pixel of the result is 2 levels, or 4 of those.
    [(64, 64, 1.1), (96, 64, 1.1), (64, 96, 1.1), (101, 64, 1.1), (200, 131, 2.1), (250, 128, 2.1)],
)
def test_adm_halves_by_boxes_and_cuts_the_middle(width, height, tolerance):
    """On a ramp every resize is the map of pixel centres, so the result is known without any resampling."""
    out = pixels(adm(ramp(width, height), 32))
    assert out.shape == (32, 32, 3)
    w, h, x, y = width, height, np.arange(width, dtype=float), np.arange(height, dtype=float)
    while min(w, h) >= 64:
        # A box of n -> n // 2 pixels spans n / (n // 2) of them.
        x, y = means(x, w // 2), means(y, h // 2)
        w, h = w // 2, h // 2
    w2, h2 = round(w * 32 / min(w, h)), round(h * 32 / min(w, h))
    x, y = centres(x, w2), centres(y, h2)
    left, top = (w2 - 32) // 2, (h2 - 32) // 2
    expected = np.meshgrid(x[left : left + 32], y[top : top + 32])
    inner = slice(4, -4)  # filters bend at borders of the image
    for channel in (0, 1):
        np.testing.assert_allclose(out[inner, inner, channel], expected[channel][inner, inner], atol=tolerance)


def means(values, count):
    """Means over `count` equal boxes, values being those of a ramp."""
    box = len(values) / count
    return np.interp((np.arange(count) + 0.5) * box - 0.5, np.arange(len(values)), values)


def centres(values, count):
    return np.interp((np.arange(count) + 0.5) * len(values) / count - 0.5, np.arange(len(values)), values)


def test_adm_halving_is_the_mean_of_2x2():
    noise = np.random.default_rng(0).integers(256, size=(16, 16), dtype=np.uint8)
    expected = noise.reshape(8, 2, 8, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(pixels(adm(Image.fromarray(noise), 8)), expected, atol=1.01)  # it rounds twice
    # Lanczos is sharper than boxes: the two crops are not the same.
    assert np.abs(pixels(edm(Image.fromarray(noise), 8)) - expected).max() > 3


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (97, 64), (64, 64), (200, 80)])
def test_edm_cuts_the_middle_square_first(width, height):
    side = min(width, height)
    out = pixels(edm(ramp(width, height), 32))
    at = (np.arange(32) + 0.5) * side / 32 - 0.5
    left, top = (width - side) // 2, (height - side) // 2
    expected = np.meshgrid(left + at, top + at)
    inner = slice(4, -4)
    for channel in (0, 1):
        np.testing.assert_allclose(out[inner, inner, channel], expected[channel][inner, inner], atol=1.1)


@pytest.mark.parametrize("crop", [adm, edm])
def test_cropping_keeps_an_image_of_the_right_size(crop):
    image = Image.fromarray(np.random.default_rng(1).integers(256, size=(32, 32, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(crop(image, 32)), np.asarray(image))
    assert np.array_equal(np.asarray(exact(image, 32)), np.asarray(image))


@pytest.mark.parametrize("crop", [adm, edm])
def test_small_images_grow(crop):
    assert crop(ramp(5, 9), 16).size == (16, 16)


def test_exact_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"is 40x32, not 32x32; change data\.image_size"):
        exact(ramp(40, 32), 32)


RED, HALF = (255, 0, 0), (255, 0, 0, 128)


@pytest.mark.parametrize(
    ("image", "colour", "grey"),
    [
        (Image.new("L", (2, 2), 90), (90, 90, 90), 90),
        (Image.new("RGB", (2, 2), RED), RED, 76),  # luma 0.299
        (Image.new("RGB", (2, 2), RED).quantize(4), RED, 76),
        (Image.new("RGBA", (2, 2), (*RED, 0)), (255, 255, 255), 255),
        (Image.new("RGBA", (2, 2), HALF), (255, 127, 127), 165),
        (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255), 255),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), RED, 76),
        (Image.new("1", (2, 2), 1), (255, 255, 255), 255),
        (Image.fromarray(np.full((2, 2), 65535, dtype=np.uint16)), (255, 255, 255), 255),
        (Image.fromarray(np.full((2, 2), 257 * 90 + 128, dtype=np.uint16)), (90, 90, 90), 90),
        (Image.fromarray(np.full((2, 2), 257 * 90 + 129, dtype=np.uint16)), (91, 91, 91), 91),
        (Image.fromarray(np.full((2, 2), 257 * 90, dtype=np.int32)), (90, 90, 90), 90),
    ],
    ids=["grey", "rgb", "palette", "clear", "half clear", "clear grey", "cmyk", "bits", "16", "16 down", "16 up", "32"],
)
def test_modes(image, colour, grey):
    assert with_channels(image, 3).mode == "RGB"
    assert with_channels(image, 1).mode == "L"
    np.testing.assert_allclose(pixels(with_channels(image, 3))[0, 0], colour, atol=1.01 if image.mode == "RGBA" else 0)
    np.testing.assert_allclose(pixels(with_channels(image, 1))[0, 0], grey, atol=1.01 if image.mode == "RGBA" else 0)


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=1)
    assert np.asarray(with_channels(Image.open(tmp_path / "a.png"), 3)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_camera_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees
    ramp(8, 4).save(tmp_path / "a.png", exif=exif)
    upright = with_channels(Image.open(tmp_path / "a.png"), 3)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(ramp(8, 4)), -1))


@pytest.mark.parametrize("values", [np.zeros((2, 2), np.float32), np.full((2, 2), 70000, np.int32)])
def test_pixels_without_a_known_range_are_refused(values):
    with pytest.raises(ValueError, match="range is not known"):
        with_channels(Image.fromarray(values), 1)
