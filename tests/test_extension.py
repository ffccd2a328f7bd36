"""What somebody brings from outside the package trains, resumes, loads, samples, evaluates and edits like our own.

Through the commands, in processes of their own, from a folder that only the user has.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import forked
from consistency import load, load_denoiser
from consistency.models.register import import_modules

pytestmark = pytest.mark.slow

THEIRS = Path(__file__).parent / "data" / "extension"
TRAIN = ("--config-dir", "my_conf", "experiment=null", "method=mine", "network=mine", "data=stripes")
TRAIN += (
    "parametrization._target_=mine.PredictX",
    "~parametrization.noise_scale",
    "metric._target_=mine.root_mean_square",
)
TRAIN += (
    "~method.weighting",
    "run_name=theirs",
    "callbacks.sample_grid.num_samples=4",
    "callbacks.log.every_n_steps=5",
)
BRING = "imports=[mine]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder with a finished run of their own network, parametrization, method, metric and data."""
    folder = tmp_path_factory.mktemp("user") / "work"
    shutil.copytree(THEIRS, folder)
    command(folder, "train", *TRAIN, "trainer.max_steps=20")
    return folder


def command(folder, name, *arguments, code=0):
    return forked.command(name, *arguments, cwd=folder, code=code)


def test_what_is_trained_is_the_users_own(folder):
    stored = json.loads((folder / "outputs/theirs/model/config.json").read_text())["denoiser"]
    assert stored["network"]["name"] == "mine_mlp"
    assert stored["network"]["arguments"]["width"] == 32
    assert stored["parametrization"] == {"name": "mine_predict_x", "arguments": {"sigma_data": 1.0, "boundary": 0.0}}
    assert stored["kind"] == "diffusion"
    header, *rows = (folder / "outputs/theirs/metrics.csv").read_text().splitlines()
    weights = [float(row.split(",")[header.split(",").index("w")]) for row in rows]
    assert len(set(weights)) == len(weights)  # the second module is trained


def test_a_run_goes_on_to_the_same_bits(folder):
    straight = (folder / "outputs/theirs/model/model.safetensors").read_bytes()
    options = ("trainer.max_steps=20", "run_name=again")
    command(folder, "train", *TRAIN, *options, "+trainer.max_time=00:00:00:00", code=1)
    command(folder, "train", *TRAIN, *options)
    assert (folder / "outputs/again/model/model.safetensors").read_bytes() == straight


def test_an_unknown_name_is_said_with_what_helps(folder):
    said = command(folder, "sample", "ckpt=outputs/theirs", code=2)
    assert "'mine_mlp' is not registered" in said
    assert "imports=[MODULE]" in said
    assert len([line for line in said.splitlines() if line.startswith("consistency:")]) == 1


@pytest.mark.parametrize("ckpt", ["outputs/theirs", "outputs/theirs/model", "outputs/theirs/checkpoints/last.ckpt"])
def test_it_is_sampled(folder, ckpt):
    out = f"{ckpt.replace('/', '_')}.npz"
    command(folder, "sample", f"ckpt={ckpt}", BRING, "num_samples=6", f"out={out}", "device=cpu")
    assert np.load(folder / out)["arr_0"].shape == (6, 8, 8, 1)


def test_two_processes_bring_it_too(folder):
    options = ("ckpt=outputs/theirs", BRING, "num_samples=6", "batch_size=3", "device=cpu")
    for count in (1, 2):
        command(folder, "sample", *options, f"devices={count}", f"out={count}.npz")
    assert (np.load(folder / "1.npz")["arr_0"] == np.load(folder / "2.npz")["arr_0"]).all()


def test_a_sampler_of_ones_own(folder):
    own = (
        "sampler=heun",
        "~sampler.solver",
        "~sampler.num_steps",
        "sampler._target_=mine.my_sampler",
        "+sampler._partial_=true",
    )
    common = ("ckpt=outputs/theirs", BRING, "num_samples=4", "device=cpu")
    command(folder, "sample", *common, *own, "+sampler.steps=3", "out=own.npz")
    command(folder, "sample", *common, "out=heun.npz")
    assert (np.load(folder / "own.npz")["arr_0"] != np.load(folder / "heun.npz")["arr_0"]).any()


def test_it_is_evaluated_with_its_own_data(folder):
    options = ("evaluation=classifier", "evaluation.num_samples=100", "evaluation.allow_few=true", "device=cpu")
    command(folder, "evaluate", "ckpt=outputs/theirs", BRING, *options, "evaluation.batch_size=50", "out=scores.json")
    row = json.loads((folder / "scores.json").read_text())["rows"][0]
    assert np.isfinite(row["fd_classifier"]) if "fd_classifier" in row else any("fd" in key for key in row)


def test_it_is_edited_with_its_own_data(folder):
    command(folder, "edit", "ckpt=outputs/theirs", BRING, "task=inpaint", "task.mask=left", "num_images=2", "out=edits")
    assert (folder / "edits/grid.png").exists()


def test_it_is_loaded_in_python(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    model = load(folder / "outputs/theirs", imports=["mine"], device="cpu")
    assert model.sample(3, seed=0).shape == (3, 1, 8, 8)
    assert not model.is_consistency


def test_the_network_serves_consistency_training_and_distillation(folder, monkeypatch):
    common = ("--config-dir", "my_conf", "experiment=null", "data=stripes", "trainer.max_steps=4")
    common += ("callbacks.sample_grid=null",)
    command(folder, "train", *common, "network=mine", "method=ict", "run_name=ict", "curriculum.end=20")
    command(folder, "train", *common, "network=mine", "method=edm", "run_name=teacher")
    command(folder, "train", *common, BRING, "method=cd", "teacher=outputs/teacher", "run_name=cd")
    monkeypatch.syspath_prepend(folder)
    import_modules(["mine"])
    student, teacher = (load_denoiser(folder / f"outputs/{name}/checkpoints/last.ckpt") for name in ("cd", "teacher"))
    assert (student.kind, teacher.kind) == ("consistency", "diffusion")
    assert student.network.config == teacher.network.config


def test_a_missing_module_is_one_line(folder):
    said = command(folder, "sample", "ckpt=outputs/theirs", "imports=[nowhere]", code=2)
    assert "imports has 'nowhere'" in said
