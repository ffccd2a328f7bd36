"""consistency-edit in this process, every task on a small model; test_api.py holds what the tasks must keep."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from composing import composed
from consistency import load, save_denoiser
from consistency.api import Model
from consistency.commands.checks import check
from consistency.commands.edit import edit
from consistency.data.image_files import read_images, save_png, save_pngs

INFO = {"method": "ConsistencyTraining", "weights": "ema0.999"}


def run(folder, *overrides, out="out"):
    cfg = composed("edit", f"ckpt={folder / 'model'}", f"out={folder / out}", "device=cpu", *overrides)
    check("edit", cfg)
    return edit(cfg)


@pytest.fixture
def folder(make_denoiser, tmp_path):
    """A class-conditional colour model of 4 x 4 pixels, and five images."""
    denoiser = make_denoiser(in_channels=3, num_classes=3, label_dropout=0.1)
    save_denoiser(denoiser, tmp_path / "model", INFO)
    save_pngs(torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8), tmp_path / "images")
    return tmp_path


TASKS = {
    "inpaint": ["steps=2", "task.mask=left"],
    "colorize": ["steps=2"],
    "superresolve": ["steps=2", "task.factor=4"],
    "stroke": ["task.sigma=[0.2,0.8]"],
    "translate": ["task.to=[0,1]", "task.sigma=1"],
    "denoise": ["task.sigma=[0.25,1]"],
    "interpolate": ["task.num_images=3"],
}


@pytest.mark.parametrize("task", TASKS)
def test_tasks_on_a_folder(folder, task):
    out = run(folder, f"task={task}", f"images={folder / 'images'}", "num_images=3", *TASKS[task])
    said = json.loads((out / "edit.json").read_text())
    count = 1 if task == "interpolate" else 3
    for name in said["columns"]:
        assert len(read_images(out / name.replace(" ", "_"))) == count
    width, height = Image.open(out / "grid.png").size
    assert (width, height) == (2 + 34 * len(said["columns"]), 2 + 34 * count)  # cells of 32 pixels, 2 between
    drawn = {name: column for name, column in said["columns"].items() if column["levels"]}
    assert all(column["evaluations"] == len(column["levels"]) for column in drawn.values())
    assert set(said["columns"]) - set(drawn) <= {"given", "original", "sigma 0.25 noisy", "sigma 1 noisy"}
    if task == "stroke":
        assert [column["levels"][0] for column in drawn.values()] == [0.2, 0.8]
    assert said["model"] == INFO
    if "original" in said["columns"]:
        assert torch.equal(read_images(out / "original"), read_images(folder / "images")[:3])


@pytest.mark.parametrize(
    "overrides",
    [
        ["task=interpolate", "gif=true", "task.num_images=4"],
        ["task=anagram", "task.up=0", "task.down=1", "steps=2", "num_images=3"],
        ["task=hybrid", "task.far=0", "task.near=1", "steps=2", "guidance=2", "num_images=3"],
    ],
)
def test_tasks_without_images(folder, overrides):
    out = run(folder, *overrides)
    assert (out / "grid.png").exists()
    assert (out / "strip.gif").exists() == ("gif=true" in overrides)
    if "num_images=3" in overrides:
        said = json.loads((out / "edit.json").read_text())["columns"]
        assert all(column["images"] == 3 for column in said.values())
        assert next(iter(said.values()))["labels"] == [0, 0, 0]


def test_data_sets_bring_their_labels(folder, make_denoiser, tmp_path):
    denoiser = make_denoiser(image_size=8, num_classes=10)
    save_denoiser(denoiser, tmp_path / "model", INFO)
    out = run(folder, "data=digits", "task=stroke", "num_images=3")
    from consistency.data.datasets import digits

    data = digits()
    assert torch.equal(read_images(out / "given"), data.images[:3])
    name = next(path.name for path in out.iterdir() if path.name.startswith("sigma"))
    own = Model(denoiser, INFO, device="cpu").stroke(data.images[:3], labels=data.labels[:3])
    assert torch.equal(read_images(out / name), own)


def test_data_without_labels_say_nothing_of_labels(folder, make_denoiser, tmp_path):
    # A folder without classes has label 0 everywhere, which is not the first class of the model.
    save_denoiser(make_denoiser(in_channels=3, num_classes=3, label_dropout=0.1), tmp_path / "model", INFO)
    options = [f"data.dataset.path={folder / 'images'}", "data.image_size=4", "data.num_classes=0"]
    first = run(folder, "data=folder", *options, "task=stroke", "num_images=3", "task.sigma=1")
    model, images = load(tmp_path / "model", device="cpu"), read_images(first / "given")
    assert torch.equal(read_images(first / "sigma_1"), model.stroke(images, 1.0, labels=-1))


def test_files_of_other_shapes_and_kinds(folder):
    big = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    save_png(big, folder / "photo.png")
    given = read_images(run(folder, f"images={folder / 'photo.png'}", "steps=1") / "original")
    assert given.shape == (1, 3, 4, 4)  # ADM's crop
    np.savez(folder / "grey.npz", arr_0=np.zeros((2, 4, 4, 1), np.uint8))
    assert len(read_images(run(folder, f"images={folder / 'grey.npz'}", "steps=1", out="b") / "original")) == 2
    save_png(big[:, :2, :2], folder / "tiny.png")
    small = ("task=superresolve", "steps=1", f"images={folder / 'tiny.png'}")
    assert json.loads((run(folder, *small, out="c") / "edit.json").read_text())["columns"].keys() == {
        "given",
        "enlarged",
    }


def test_npz_brings_its_labels(folder):
    array = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(folder / "some.npz", arr_0=array, arr_1=np.array([2, 0, 1]))
    out = run(folder, f"images={folder / 'some.npz'}", "task=stroke", "num_images=2", "task.sigma=1")
    assert json.loads((out / "edit.json").read_text())["columns"]["sigma 1"]["labels"] == [2, 0]
    np.savez(folder / "some.npz", arr_0=array, arr_1=np.array([2, 0, 44]))
    with pytest.raises(ValueError, match="44"):
        run(folder, f"images={folder / 'some.npz'}", "task=stroke", out="b")


def test_mask_file_keeps_white(folder):
    mask = torch.zeros(1, 4, 4, dtype=torch.uint8)
    mask[:, :, :1] = 255
    save_png(mask, folder / "mask.png")
    out = run(folder, f"images={folder / 'images'}", f"task.mask={folder / 'mask.png'}", "steps=1")
    filled, original = read_images(out / "inpainted"), read_images(out / "original")
    assert torch.equal(filled[..., :1], original[..., :1])
    assert not torch.equal(filled[..., 1:], original[..., 1:])


WRONG = {
    "not empty": (["images={}/images", "out={}/images"], "empty folder"),
    "no data": (["task=stroke"], "does not say what it was trained on"),
    "ending": (["images={}/model/config.json"], "no image by its ending"),
    "missing": (["task=anagram", "task.up=1"], "task.down"),
    "levels": (["images={}/images", "sigmas=[1,2]"], "decrease"),
    "steps": (["images={}/images", "steps=0"], "steps is 0"),
    "guidance": (["images={}/images", "guidance=much"], "guidance is much"),
    "absent": (["images={}/nothing"], "images is"),
    "mask": (["images={}/images", "task.mask=middle"], "mask is middle"),
    "mask file": (["images={}/images", "task.mask={}/nothing.png"], "does not exist"),
    "white": (["images={}/images", "task.mask={}/white.png"], "hides nothing"),
    "factor": (["images={}/images", "task=superresolve", "task.factor=0"], "factor is 0"),
    "half": (["images={}/images", "task=superresolve", "task.factor=2.5"], "factor is 2.5"),
    "two sources": (["images={}/images", "data=digits"], "leave one"),
    "twice": (["images={}/images", "task=stroke", "task.sigma=[1,1]"], "different"),
    "levels of denoise": (["images={}/images", "task=denoise", "sigmas=[2,1]"], "task.sigma"),
    "labels of anagram": (["task=anagram", "task.up=0", "task.down=1", "labels=1"], "leave labels out"),
    "one image": (["images={}/images", "task=interpolate", "num_images=1"], "two images"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused_in_one_line(folder, case):
    overrides, words = WRONG[case]
    save_png(torch.full((1, 4, 4), 255, dtype=torch.uint8), folder / "white.png")
    with pytest.raises(ValueError, match=words) as error:
        run(folder, *(text.replace("{}", str(folder)) for text in overrides))
    assert "\n" not in str(error.value)
    assert not (folder / "out").exists()
