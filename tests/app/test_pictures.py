"""What a browser may send: bounded before it is decoded, refused in one line."""

import io
import json
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from consistency.app.pictures import MAX_PIXELS, data_url, painted, read_board, read_upload, write_board

SHAPE = (1, 8, 8)


def png_that_declares(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_before_it_takes_memory(tmp_path):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_that_declares(8192, 8192))
    assert MAX_PIXELS < 8192**2
    assert bomb.stat().st_size < 10_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"8,192 x 8,192 pixels; allowed: 16,777,216 in all"):
        read_upload(bomb, SHAPE)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


@pytest.mark.parametrize(
    "data", [b"", b"%PDF-1.7 no image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", png_that_declares(60_000, 60_000),
             png_that_declares(64, 4000)[:80]]
)  # fmt: skip
def test_other_files_are_refused_in_one_line(tmp_path, data):
    file = tmp_path / "picture.png"
    file.write_bytes(data)
    with pytest.raises(ValueError, match="the upload ") as refused:
        read_upload(file, SHAPE)
    assert "\n" not in str(refused.value)


def test_an_upload_comes_at_the_models_size(tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(pixels).save(tmp_path / "same.png")
    assert torch.equal(read_upload(tmp_path / "same.png", SHAPE)[0], torch.from_numpy(pixels))
    Image.new("RGB", (60, 32), (255, 0, 0)).save(tmp_path / "wide.jpg")
    assert read_upload(tmp_path / "wide.jpg", (3, 8, 8)).shape == (3, 8, 8)
    strip = Image.new("L", (1, 30_001))  # a crop that resizes first would make 8 x 240,008 of it
    strip.putpixel((0, 15_000), 9)
    strip.save(tmp_path / "strip.png")
    assert torch.equal(read_upload(tmp_path / "strip.png", SHAPE), torch.full(SHAPE, 9, dtype=torch.uint8))


def test_a_board_comes_back_as_it_was():
    image = torch.randint(0, 256, SHAPE, dtype=torch.uint8)
    drawing = torch.randint(0, 256, (4, 8, 8), dtype=torch.uint8)
    read, layer = read_board(json.dumps({"image": data_url(image), "drawing": data_url(drawing)}), SHAPE)
    assert torch.equal(read, image)
    assert torch.equal(layer, drawing)
    read, layer = read_board(write_board(image), SHAPE)
    assert torch.equal(read, image)
    assert not layer.any()
    assert read_board(None, SHAPE)[0] is None
    assert read_board(write_board(None), SHAPE)[0] is None


def other_size():
    return data_url(torch.zeros(1, 16, 16, dtype=torch.uint8))


def jpeg():
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "JPEG")
    return "data:image/png;base64," + __import__("base64").b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    "value",
    [
        "", "[", "null", "[]", "{}", 3, {"image": None}, '{"image": 3, "drawing": null}', "[" * 5000,
        json.dumps({"image": "http://127.0.0.1/x.png", "drawing": None}),
        json.dumps({"image": "file:///etc/hostname", "drawing": None}),
        json.dumps({"image": "data:image/png;base64,????", "drawing": None}),
        json.dumps({"image": other_size(), "drawing": None}),
        json.dumps({"image": None, "drawing": jpeg()}),
        json.dumps({"image": "data:image/png;base64," + "A" * 100_000, "drawing": None}),
    ],
)  # fmt: skip
def test_anything_else_on_a_board_is_refused_in_one_line(value):
    with pytest.raises(ValueError, match="the drawing ") as refused:
        read_board(value, SHAPE)
    assert "\n" not in str(refused.value)


def test_a_painting_is_laid_over_the_image():
    image = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    drawing = torch.zeros(4, 8, 8, dtype=torch.uint8)
    drawing[0, :4], drawing[3, :4] = 255, 255
    drawing[3, 0] = 51  # a fifth
    result = painted(image, drawing, 3)
    assert result[:, 7, 0].tolist() == [100, 100, 100]
    assert result[:, 2, 0].tolist() == [255, 0, 0]
    assert result[:, 0, 0].tolist() == [131, 80, 80]
    assert painted(None, drawing, 1)[0, 2, 0] == 76  # luma of red
    assert painted(None, drawing, 1)[0, 7, 0] == 0
