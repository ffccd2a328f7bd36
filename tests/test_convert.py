"""consistency-convert and consistency-export, from options to folders."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from consistency import config
from consistency.checkpoints.io import load_denoiser, load_model
from consistency.ops import append_dims
from consistency.runs.convert import convert, export

DATA = Path(__file__).parent / "data"
config.register()


def run(command, **options):
    overrides = [f"{key}={value}" for key, value in options.items()]
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        cfg = compose(command, overrides=overrides)
    {"convert": config.validate_convert, "export": config.validate_export}[command](cfg)
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
    folder = run("convert", format="edm", source=DATA / f"{name}.pkl", out=tmp_path / "out")
    assert error(folder, golden(name)[0], "denoised_edm") < 5e-5


def test_state_dict_of_nvlabs(published, tmp_path):
    state, tensors, _ = published("edm_ddpmpp_class_cond")
    torch.save(state, tmp_path / "state.pt")
    folder = run("convert", format="edm", source=tmp_path / "state.pt", out=tmp_path / "out")
    assert error(folder, tensors, "denoised_edm") < 5e-5


@pytest.mark.parametrize(
    ("name", "boundary", "method"),
    [("edm_bedroom.pt", 0, "EDM"), ("cd.pt", 0.002, "consistency"), ("x.pt", 0.002, None)],
)
def test_scalings_by_the_name_of_the_file(openai_file, tmp_path, name, boundary, method):
    source, _ = openai_file(name)
    folder = run("convert", format="openai", source=source, out=tmp_path / "out", head_channels=16)
    denoiser, info = load_model(folder)
    assert denoiser.boundary == boundary
    assert denoiser.noise_scale == 250
    assert method in (None, info["method"])


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
    assert {name: getattr(denoiser, name) for name in options} == options
    assert denoiser.boundary == 0.01


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
        ({"head_channels": 24}, "do not divide into heads of 24"),
        ({"format": "edm"}, "not a network of NVlabs' layout"),
        ({"image_size": 17}, "image_size must be divisible by 2"),
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
