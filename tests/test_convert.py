"""consistency-convert and consistency-export, from options to folders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from composing import composed
from consistency.checkpoints.native import load_denoiser
from consistency.commands import checks
from consistency.commands.convert import convert, export
from consistency.commands.sample import sample
from consistency.commands.train import train
from consistency.models.parametrization import EDM
from consistency.ops import append_dims
from snapshots import snapshot

DATA = Path(__file__).parent / "data"


def run(command, **options):
    cfg = composed(command, *(f"{key}={value}" for key, value in options.items()))
    checks.check(command, cfg)
    return {"convert": convert, "export": export}[command](cfg)


@torch.no_grad()
def error(folder, tensors, key):
    denoiser, noisy = load_denoiser(folder), tensors["x"] * append_dims(tensors["sigma"], 4)
    return float((denoiser(noisy, tensors["sigma"], tensors.get("class_labels")) - tensors[key]).abs().max())


@pytest.fixture
def openai_file(published, tmp_path):
    """The class-conditional network of OpenAI's layout as a file of a given name."""

    def write(name="ct.pt", network="openai_unet_class_cond"):
        state, tensors, _ = published(network)
        torch.save(state, tmp_path / name)
        return tmp_path / name, tensors

    return write


@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("openai_unet_class_cond", {"head_channels": 16}),
        ("openai_unet_lsun_like", {"head_channels": 32, "image_size": 16}),
        ("openai_unet_plain_resample", {"num_heads": 2}),
    ],
)
@pytest.mark.parametrize(("kind", "key"), [("consistency", "denoised_boundary"), ("edm", "denoised_edm")])
def test_openai(openai_file, tmp_path, network, options, kind, key):
    source, tensors = openai_file(network=network)
    folder = run("convert", format="openai", source=source, out=tmp_path / "out", kind=kind, **options)
    assert error(folder, tensors, key) < 5e-5


@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm_ncsnpp", "edm_adm_class_cond"])
def test_snapshots_of_nvlabs(golden, tmp_path, name):
    folder = run("convert", format="edm", source=snapshot(name, tmp_path), out=tmp_path / "out")
    assert error(folder, golden(name)[0], "denoised_edm") < 5e-5


def test_state_dict_of_nvlabs(published, tmp_path):
    state, tensors, _ = published("edm_ddpmpp_class_cond")
    torch.save(state, tmp_path / "state.pt")
    folder = run("convert", format="edm", source=tmp_path / "state.pt", out=tmp_path / "out")
    assert error(folder, tensors, "denoised_edm") < 5e-5


@pytest.mark.parametrize(
    ("name", "boundary", "kind"),
    [("edm_bedroom.pt", 0, "diffusion"), ("cd.pt", 0.002, "consistency"), ("x.pt", 0.002, "consistency")],
)
def test_kind_by_the_name_of_the_file(openai_file, tmp_path, name, boundary, kind):
    source, _ = openai_file(name)
    folder = run("convert", format="openai", source=source, out=tmp_path / "out", head_channels=16)
    denoiser = load_denoiser(folder)
    assert denoiser.parametrization == EDM(boundary=boundary, noise_scale=250)
    assert denoiser.kind == kind


def test_folder_says_where_it_comes_from(openai_file, tmp_path):
    source, _ = openai_file()
    run("convert", format="openai", source=source, out=tmp_path / "out", head_channels=16)
    info = json.loads((tmp_path / "out" / "config.json").read_text())["info"]
    assert info["imported"]["source"] == "ct.pt"
    assert len(info["imported"]["sha256"]) == 64


def test_options_win_over_what_is_assumed(openai_file, tmp_path):
    source, _ = openai_file()
    options = {"noise_scale": 0.25, "sigma_data": 0.6, "sigma_min": 0.01, "sigma_max": 50}
    folder = run("convert", format="openai", source=source, out=tmp_path / "out", head_channels=16, **options)
    denoiser = load_denoiser(folder)
    assert denoiser.parametrization == EDM(sigma_data=0.6, boundary=0.01, noise_scale=0.25)
    assert (denoiser.sigma_min, denoiser.sigma_max) == (0.01, 50)


def test_there_and_back_through_diffusers(openai_file, tmp_path):
    pytest.importorskip("diffusers")
    source, tensors = openai_file()
    run("convert", format="openai", source=source, out=tmp_path / "ours", head_channels=16)
    run("export", ckpt=tmp_path / "ours", format="diffusers", out=tmp_path / "pipe")
    folder = run("convert", format="diffusers", source=tmp_path / "pipe", out=tmp_path / "back")
    assert error(folder, tensors, "denoised_boundary") < 5e-5


def test_export_to_safetensors(openai_file, tmp_path):
    source, tensors = openai_file()
    run("convert", format="openai", source=source, out=tmp_path / "ours", head_channels=16)
    assert error(run("export", ckpt=tmp_path / "ours", out=tmp_path / "copy"), tensors, "denoised_boundary") < 5e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "onnx"}, "format is onnx; allowed: openai, edm or diffusers"),
        ({"source": "nowhere.pt"}, "source is nowhere.pt; allowed: a file that exists"),
        ({"kind": "ddpm"}, "kind is ddpm; allowed: consistency or edm"),
        ({"format": "edm", "kind": "consistency"}, "kind is consistency; allowed: edm with format=edm"),
        ({"format": "edm", "image_size": 32}, "image_size is 32; allowed: null with format=edm"),
        ({"head_channels": 16, "num_heads": 2}, "num_heads is 2; allowed: null where head_channels"),
        ({"head_channels": 0}, "head_channels is 0"),
        ({"noise_scale": -1}, "noise_scale is -1; allowed: a positive number"),
        ({"head_channels": 24}, "attention over 64 channels, no multiple of head_channels=24"),
        ({"format": "edm"}, "not a network of NVlabs' layout"),
        (
            {"image_size": 17},
            r"image_size=17 can be halved 1 times; check image_size, head_channels, ",
        ),
        ({"head_channels": 16, "sigma_min": 90}, "got sigma_min=90.0, sigma_max=80.0; change sigma_min or sigma_max"),
    ],
)
def test_bad_options_are_one_line(openai_file, tmp_path, options, words):
    source, _ = openai_file()
    with pytest.raises(ValueError, match=words) as caught:
        run("convert", **{"format": "openai", "source": source, "out": tmp_path / "out", **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(openai_file, tmp_path):
    source, _ = openai_file()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        run("convert", format="openai", source=source, out=tmp_path / "out", head_channels=16)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


class TestUse:
    """An imported model in every place that takes one."""

    @pytest.fixture(scope="class")
    def user(self, tmp_path_factory):
        """A folder of images in ten classes."""
        folder = tmp_path_factory.mktemp("user")
        rng = np.random.default_rng(0)
        for label in range(10):
            (folder / "images" / f"class{label}").mkdir(parents=True)
            for index in range(2):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / f"class{label}" / f"{index}.png")
        return folder

    def train(self, user, name, *overrides):
        data = [
            "data=folder",
            f"data.dataset.path={user / 'images'}",
            f"paths.cache_dir={user / 'cache'}",
            *("data.image_size=16", "data.num_classes=10", "data.batch_size=4", "trainer.max_steps=1"),
            *("~experiment", f"paths.output_dir={user / name}", f"run_name={name}"),
            "callbacks.sample_grid.num_samples=4",
        ]
        cfg = composed("train", *data, *overrides)
        checks.check("train", cfg)
        train(cfg)
        return user / name

    # The settings of the golden network; a user reads them off the message when they differ.
    NETWORK = (
        *("network=adm_imagenet64", "network.channels=32", "network.channel_mult=[1,2]", "network.num_blocks=1"),
        *("network.attention_resolutions=[8]", "network.head_channels=16", "network.norm_groups=32"),
        *("parametrization.noise_scale=250", "optimizer.lr=1e-9"),
    )

    @pytest.fixture(scope="class")
    def teacher(self, user):
        how = json.loads((DATA / "openai_unet_class_cond.json").read_text())["parameters"]
        torch.save({name: torch.randn(shape) * 0.05 for name, shape in how.items()}, user / "edm.pt")
        return run("convert", format="openai", source=user / "edm.pt", out=user / "teacher", head_channels=16)

    def test_as_a_teacher(self, user, teacher):
        options = ("method=cd", f"teacher={teacher}", "optimizer.lr=1e-9")
        folder = self.train(user, "cd", *options)
        student, imported = load_denoiser(folder, "raw"), load_denoiser(teacher)
        assert student.parametrization == EDM(boundary=0.002, noise_scale=250)
        torch.testing.assert_close(student.network.state_dict(), imported.network.state_dict(), rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        "method", ["ict", *(pytest.param(m, marks=pytest.mark.slow) for m in ("edm", "ct", "ect"))]
    )
    def test_as_the_start_of(self, user, teacher, method):
        folder = self.train(user, method, f"method={method}", f"init_from={teacher}", *self.NETWORK)
        sampler = "heun" if method == "edm" else "onestep"
        options = [f"ckpt={folder}", f"out={user / method}.png", "num_samples=4", f"sampler={sampler}"]
        assert sample(composed("sample", *options)).exists()
        tuned, imported = load_denoiser(folder, "raw"), load_denoiser(teacher)
        torch.testing.assert_close(tuned.network.state_dict(), imported.network.state_dict(), rtol=0, atol=1e-5)

    def test_start_with_other_settings_names_them(self, user, teacher):
        with pytest.raises(ValueError, match=r"noise_scale is 0\.25 here, 250\.0 there"):
            self.train(
                user, "other", "method=ct", f"init_from={teacher}", *self.NETWORK, "parametrization.noise_scale=0.25"
            )

    def test_for_sampling(self, user, teacher):
        overrides = [f"ckpt={teacher}", f"out={user / 'heun.png'}", "num_samples=4", "sampler=heun"]
        assert sample(composed("sample", *overrides)).exists()
