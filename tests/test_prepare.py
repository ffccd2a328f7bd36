"""consistency-data on small sets, every data configuration, and own images from folder to samples."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from composing import composed
from consistency import config
from consistency.commands import checks
from consistency.commands.prepare import prepare
from consistency.commands.train import train
from consistency.data.datasets import digits
from consistency.data.module import ImageDataModule

SETS = sorted(path.stem for path in (config.CONF_DIR / "data").glob("*.yaml"))
CLASSES = {"cifar10_jpeg": 10, "cifar10": 10, "imagenet64": 1000, "flowers64": 102, "digits": 10, "digits_tinted": 10}
SIZES = {"cifar10_jpeg": 32, "cifar10": 32, "digits": 8, "digits_tinted": 8, "lsun_bedroom": 256, "lsun_cat": 256}


@pytest.fixture
def folder(tmp_path):
    """Three classes of grey images 12x9: dark, grey and bright ones."""
    for number in range(12):
        values = np.random.default_rng(number).integers(80 * (number % 3), 80 * (number % 3) + 80, size=(9, 12))
        path = tmp_path / "mine" / ("dark", "grey", "bright")[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(np.uint8)).save(path)
    return tmp_path / "mine"


@pytest.fixture
def say(tmp_path, caplog):
    """Prepare a set and return what was said."""

    def run(*overrides, out=None):
        caplog.clear()
        with caplog.at_level("INFO"):
            prepare(composed("prepare", *overrides, f"paths.data_dir={tmp_path}/data", f"out={out or 'null'}"))
        return re.sub(r" +", " ", "\n".join(record.getMessage() for record in caplog.records))

    return run


def mine(folder, *overrides):
    return ("data=folder", f"data.dataset.path={folder}", "data.image_size=8", "data.channels=1", *overrides)


def test_digits(say):
    said = say("data=digits")
    assert "images 1,797, 8x8, 1 channel (grey)" in said
    assert "classes 10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n 174 to 183 images each" in said
    pixels = digits().images.double() / 255
    assert f"mean {pixels.mean():.4f} in [0, 1]" in said
    assert f"std {pixels.std(correction=0):.4f} in [0, 1]" in said
    assert "sigma_data 0.752 in [-1, 1]" in said


def test_folder(say, folder, tmp_path):
    said = say(*mine(folder))
    assert "images 12, 8x8, 1 channel (grey)" in said
    assert "classes 3: bright, dark, grey" in said
    assert "4 to 4 images each" in said
    assert "not used; data.num_classes=3 to use them" in said
    (cache,) = [path for path in (tmp_path / "data" / "cache").iterdir() if path.is_dir()]
    assert f"cache {cache}, 0.0 MB" in said
    assert re.search(r"sha256 [0-9a-f]{64}", said)
    assert say(*mine(folder)) == said
    assert "not used" not in say(*mine(folder, "data.num_classes=3"))
    assert "3 channels (colour)" in say(*mine(folder, "data.channels=3"))


def test_statistics_on_the_fly_are_those_of_the_cache(say, folder):
    kept, fly = say(*mine(folder)), say(*mine(folder, "data.dataset.cache_dir=null"))
    assert "cache none" in fly
    for line in ("images", "classes", "mean", "std", "sigma_data"):
        assert re.search(rf"^{line} .*", kept, re.M)[0] == re.search(rf"^{line} .*", fly, re.M)[0]


def test_grid_has_a_row_for_each_class(say, folder, tmp_path):
    out = tmp_path / "new" / "grid.png"
    assert f"grid {out}" in say(*mine(folder), out=out)
    picture = np.asarray(Image.open(out))
    assert picture.shape == (2 + 3 * 34, 2 + 10 * 34, 3)  # cells of 32 and a border of 2
    rows = [picture[2 + 34 * row : 34 + 34 * row, 2 : 2 + 4 * 34 - 2] for row in range(3)]
    bright, dark, grey = ([int(row[5, 5 + 34 * column, 0]) for column in range(4)] for row in rows)
    assert max(dark) < 80 <= min(grey) <= max(grey) < 160 <= min(bright)
    assert (picture[:, 2 + 4 * 34 :] == 255).all()  # four images a class: the rest is white
    first = out.read_bytes()
    say(*mine(folder), out=out)
    assert out.read_bytes() == first
    say(*mine(folder, "seed=1"), out=out)
    assert out.read_bytes() != first


def test_grid_without_classes(say, folder, tmp_path):
    say(*mine(folder / "dark"), out=tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (2 + 4 * 34, 36)


@pytest.mark.parametrize("below", ["user.png", "dark/new.png"])
def test_grid_never_gets_among_the_data(say, folder, tmp_path, monkeypatch, below):
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    for path in (folder, "."):
        with pytest.raises(ValueError, match=rf"lies in data\.dataset\.path={re.escape(str(path))}, .* set out to"):
            say(*mine(path), out=below)
    assert {path: path.read_bytes() for path in folder.rglob("*.png")} == before


def test_only_a_grid_is_replaced(say, folder, tmp_path):
    pictures = [tmp_path / "photo.png", tmp_path / "text.png", tmp_path / "folder.png"]
    Image.new("RGB", (9, 9)).save(pictures[0])
    pictures[1].write_text("no image")
    pictures[2].mkdir()
    for out in pictures:
        with pytest.raises(ValueError, match=r"exists and is no grid of ours; set out to a new file"):
            say(*mine(folder), out=out)
    assert Image.open(pictures[0]).size == (9, 9)


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line(folder, tmp_path):
    """The build of a cache is stopped: one line, no part of a cache."""
    for number in range(1000):
        Image.new("L", (300, 300), number % 256).save(folder / "dark" / f"more{number}.png")
    code = "import sys; sys.argv[0] = 'consistency-data'; from consistency.cli import data; data()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *mine(folder), f"paths.data_dir={tmp_path / 'data'}"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 600
    while not list((tmp_path / "data").glob("cache/.*.partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=600)[1]
    assert (process.returncode, said) == (130, "consistency: stopped by Ctrl-C\n")
    assert [path.name for path in (tmp_path / "data" / "cache").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("name", SETS)
def test_every_set_composes_alone(name):
    cfg = composed("prepare", f"data={name}", "data.image_size=16", "paths.output_dir=unused")
    OmegaConf.to_container(cfg, resolve=True)
    data = instantiate(cfg.data, _convert_="object")
    assert isinstance(data, ImageDataModule)
    assert data.image_shape[1] == 16
    assert name.startswith("digits") or data._source.keywords["image_size"] == 16
    fresh = composed("prepare", f"data={name}").data
    assert (fresh.num_classes, fresh.image_size) == (CLASSES.get(name, 0), SIZES.get(name, 64))
    assert {"flip", "augment", "on_device", "num_workers"} <= set(fresh)


def test_where_things_lie_does_not_change_the_run():
    choices = {"experiment": None, "method": "ict", "data": "cifar10"}
    where = ["data.on_device=true", "data.dataset.cache_dir=/x", "data.dataset.root=/y", "paths.cache_dir=/z"]
    assert config.run_name(choices, where) == "ict_cifar10"
    assert config.run_name(choices, ["data.flip=false"]) != "ict_cifar10"
    assert config.run_name(choices, ["data.dataset.limit=5"]) != "ict_cifar10"


def test_own_grey_folder_trains(folder, tmp_path):
    """Grey images with classes and flips: the same run from a cache, decoded by workers, and from the device."""
    ways = {
        "cache": [],
        "fly": ["data.dataset.cache_dir=null", "data.num_workers=1"],
        "device": ["data.on_device=true"],
    }
    states = []
    for way, options in ways.items():
        cfg = composed(
            "train",
            "experiment=smoke_ict",
            *mine(folder, "data.num_classes=3", "data.flip=true", "data.batch_size=4", *options),
            "trainer.max_steps=4",
            "callbacks.sample_grid=null",
            f"run_name={way}",
            f"paths.output_dir={tmp_path / way}",
            f"paths.data_dir={tmp_path}",
        )
        checks.check("train", cfg)
        train(cfg)
        states.append(torch.load(tmp_path / way / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    assert states[0]["denoiser.network.stem.weight"].shape[1] == 1
    tensors = [key for key, value in states[0].items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(states[0][key], state[key]) for state in states[1:] for key in tensors)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data=folder"], "data.dataset.path is not set"),
        (["data=zip"], "data.dataset.path is not set"),
        (["data=hf"], "data.dataset.name is not set"),
        (["data=folder", "data.dataset.path=nowhere"], "nowhere does not exist; change data.dataset.path"),
        (["data=zip", "data.dataset.path=nowhere.zip"], "nowhere.zip does not exist"),
        (["data=lsun_cat", "paths.data_dir=nowhere"], "nowhere/lsun/cat_lmdb does not exist"),
        (["data=imagenet64", "paths.data_dir=nowhere"], "nowhere/imagenet/train does not exist"),
    ],
)
def test_missing_data_is_one_line(overrides, words):
    with pytest.raises(ValueError) as caught:
        prepare(composed("prepare", *overrides, "out=null"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def bad(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")


def test_a_file_that_is_no_image_is_named(bad, tmp_path):
    where = (f"paths.data_dir={tmp_path}/data", f"out={tmp_path}/grid.png")
    with pytest.raises(ValueError, match=r"bad/a\.png cannot be read as an image \(.*") as caught:
        prepare(composed("prepare", "data=folder", f"data.dataset.path={tmp_path}/bad", *where))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.slow
def test_command_ends_in_one_line(bad, tmp_path):
    code = "import sys; sys.argv[0] = 'consistency-data'; from consistency.cli import data; data()"
    command = [sys.executable, "-c", code, "data=folder", "data.dataset.path=bad"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("consistency: bad/a.png cannot be read as an image (")
    assert not (tmp_path / "grid.png").exists()
