"""The page's requests without the page."""

import pytest
import torch

from consistency.app import page
from consistency.app.page import answer, settings_of

SETTINGS = {"steps": 2, "labels": 3, "seed": 7, "guidance": 1.0}


@pytest.fixture
def image():
    return torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8)


@pytest.fixture
def drawing():
    layer = torch.zeros(4, 8, 8, dtype=torch.uint8)
    layer[:, 4:] = 255
    return layer


def test_inpainting_fills_what_was_drawn_and_nothing_else(model, image, drawing):
    hole, filled = page.inpaint(model, SETTINGS, image, drawing)
    assert torch.equal(filled[:, :4], image[0, :, :4])
    assert not torch.equal(filled[:, 4:], image[0, :, 4:])
    assert torch.equal(hole[:, 4:], torch.full_like(hole[:, 4:], 128))
    expected = model.inpaint(image, drawing[3] == 0, steps=2, seed=7, labels=3)
    assert torch.equal(filled, expected[0])


def test_the_other_tasks_are_those_of_the_python_api(model, colour_model, image, drawing):
    small = image.float().reshape(1, 1, 4, 2, 4, 2).mean((3, 5)).round().to(torch.uint8)
    shown = page.superresolve(model, SETTINGS, image, drawing, 2)
    assert torch.equal(shown[1:2], model.superresolve(small, 2, steps=2, seed=7, labels=3))
    painted = image.clone()
    painted[:, :, 4:] = 255
    shown = page.stroke(model, SETTINGS, image, drawing, 0.8)
    assert torch.equal(shown[:1], painted)
    assert torch.equal(shown[1:], model.stroke(painted, 0.8, steps=2, seed=7, labels=3))
    coloured = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    settings = settings_of(2, "auto", 7, 1.0)
    grey, result = page.colorize(colour_model, settings, coloured, drawing)
    assert torch.equal(grey[0], grey[2])
    assert torch.equal(result, colour_model.colorize(coloured, steps=2, seed=7)[0])


def test_wrong_requests_are_one_line(model, image, drawing):
    wrong = {
        "take a sample or upload one": lambda: page.inpaint(model, SETTINGS, None, drawing),
        "draw over what is to be filled": lambda: page.inpaint(model, SETTINGS, image, 0 * drawing),
        "seed is -1; allowed: an integer from 0 to 4294967295": lambda: settings_of(1, "auto", -1, 1.0),
        "seed is None; allowed": lambda: settings_of(1, "auto", None, 1.0),
        "guidance": lambda: page.stroke(model, {**SETTINGS, "guidance": 4.0}, image, drawing, 0.8),
        "sigma must be above 0.002 and at most 80": lambda: page.stroke(model, SETTINGS, image, drawing, 99.0),
    }
    for words, request in wrong.items():
        shown, line = answer(model, request)
        assert shown is None
        assert words in line
        assert "\n" not in line


def test_a_failing_model_leaves_a_line(model, caplog):
    def fail():
        raise RuntimeError("out of memory\nand much more")

    assert answer(model, fail) == (None, "failed: out of memory; the terminal has the details")
    assert "much more" in caplog.text  # in the terminal
