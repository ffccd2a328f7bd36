"""The page's requests without the page."""

import threading
import time
from dataclasses import replace

import pytest
import torch

from consistency.app.studio import Settings, Studio

SETTINGS = Settings(steps=2, label="3", seed=7)


@pytest.fixture
def image():
    return torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8)


@pytest.fixture
def drawing():
    layer = torch.zeros(4, 8, 8, dtype=torch.uint8)
    layer[:, 4:] = 255
    return layer


def test_samples_are_those_of_the_python_api(studio):
    answer = studio.sample(5, SETTINGS)
    assert torch.equal(answer.images, studio.model.sample(5, steps=2, seed=7, labels=3))
    assert not torch.equal(answer.images, studio.sample(5, replace(SETTINGS, label="4")).images)
    assert "2 network evaluations, cpu" in answer.line
    assert "ms" in answer.line


def test_small_images_are_enlarged_by_whole_pixels(studio):
    picture = studio.sample(1, SETTINGS).picture()
    assert picture.shape == (480, 480, 3)  # 60 x 60 for each pixel
    inner = picture.reshape(8, 60, 8, 60, 3)
    assert (inner == inner[:, :1, :, :1]).all()


def test_inpainting_fills_what_was_drawn_and_nothing_else(studio, image, drawing):
    answer = studio.inpaint(image, drawing, SETTINGS)
    hole, filled = answer.images
    assert torch.equal(filled[:, :4], image[:, :4])
    assert not torch.equal(filled[:, 4:], image[:, 4:])
    assert torch.equal(hole[:, 4:], torch.full_like(hole[:, 4:], 128))
    expected = studio.model.inpaint(image, drawing[3] == 0, steps=2, seed=7, labels=3)
    assert torch.equal(filled, expected[0])


def test_the_other_tasks_are_those_of_the_python_api(studio, colour_studio, image, drawing):
    small = image.float().reshape(1, 4, 2, 4, 2).mean((2, 4)).round().to(torch.uint8)
    shown = studio.superresolve(image, "2", SETTINGS).images
    assert torch.equal(shown[1:2], studio.model.superresolve(small, 2, steps=2, seed=7, labels=3))
    painted = image.clone()
    painted[:, 4:] = 255
    shown = studio.stroke(image, drawing, 0.8, SETTINGS).images
    assert torch.equal(shown[0], painted)
    assert torch.equal(shown[1:], studio.model.stroke(painted, 0.8, steps=2, seed=7, labels=3))
    path = studio.model.interpolate(7, 9, places=[0, 0.25, 1], steps=2, labels=3)
    assert torch.equal(studio.interpolate(9, 0.25, SETTINGS).images, path[1:2])
    coloured = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    grey, result = colour_studio.colorize(coloured, SETTINGS).images
    assert torch.equal(grey[0], grey[2])
    assert torch.equal(result, colour_studio.model.colorize(coloured, steps=2, seed=7)[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": -1}, "seed is -1; allowed: an integer from 0"),
        ({"seed": None}, "seed is None; allowed"),
        ({"seed": 2**32}, "allowed: an integer from 0 to 4294967295"),
        ({"seed": float("nan")}, "seed is nan; allowed"),
        ({"steps": 0}, "steps is 0; allowed: an integer from 1 to 64"),
        ({"steps": 65}, "steps is 65; allowed"),
        ({"steps": True}, "steps is True; allowed"),
        ({"label": "10"}, "label is 10; allowed: auto or 0 to 9"),
        ({"label": [1]}, "label is [1]; allowed: auto or 0 to 9"),
    ],
)
def test_wrong_settings_are_one_line(studio, changes, words):
    answer = studio.sample(2, replace(SETTINGS, **changes))
    assert answer.images is None
    assert answer.picture() is None
    assert words in answer.line
    assert "\n" not in answer.line


def test_wrong_requests_are_one_line(studio, image, drawing):
    refused = {
        "images is 65; allowed: an integer from 1 to 64": studio.sample(65, SETTINGS),
        "take a sample or upload one": studio.inpaint(None, drawing, SETTINGS),
        "draw over what is to be filled": studio.inpaint(image, 0 * drawing, SETTINGS),
        "factor is 3; allowed: 2, 4": studio.superresolve(image, "3", SETTINGS),
        "point is 1.5; allowed: a number from 0 to 1": studio.interpolate(1, 1.5, SETTINGS),
        "noise level is nan": studio.stroke(image, drawing, float("nan"), SETTINGS),
    }
    for words, answer in refused.items():
        assert answer.images is None
        assert words in answer.line


def test_guidance_is_used_and_checked_only_by_models_that_know_it(studio, new_studio):
    assert studio.sample(1, replace(SETTINGS, guidance=99)).images is not None
    guided = new_studio(label_dropout=0.1)
    assert "guidance is 99; allowed" in guided.sample(1, replace(SETTINGS, guidance=99)).line
    strong, weak = (guided.sample(1, replace(SETTINGS, guidance=weight)).images for weight in (4, 1))
    assert not torch.equal(strong, weak)


class Broken:
    """A model that fails, and notes how many requests it serves at a time."""

    image_shape, num_classes, is_consistency, can_guide, device = (1, 8, 8), 0, True, False, "cpu"
    denoiser, now, most = torch.nn.Identity(), 0, 0

    def sample(self, number, **_):
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(0.02)
        self.now -= 1
        raise RuntimeError("out of memory\nand much more")


def test_a_failing_model_leaves_a_line_and_the_next_request_is_served(caplog):
    studio = Studio(Broken())
    for _ in range(2):
        assert studio.sample(1, SETTINGS).line == "failed: out of memory; the terminal has the details"
    assert "much more" in caplog.text  # in the terminal
    assert not studio.model.denoiser._forward_pre_hooks


def test_one_request_at_a_time():
    studio = Studio(Broken())
    threads = [threading.Thread(target=studio.sample, args=(1, SETTINGS)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert studio.model.most == 1
