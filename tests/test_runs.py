"""The jobs behind the commands, in this process on the smoke recipes; test_cli.py runs the commands themselves."""

import csv
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from PIL import Image

from composing import composed
from consistency.checkpoints.native import load_model, save_denoiser
from consistency.commands import checks
from consistency.commands.sample import sample
from consistency.models.denoiser import Denoiser
from consistency.models.parametrization import EDM
from running import SHORT, run


def draw(folder, ckpt, *overrides, out="images.png"):
    """Sample into the folder, as the command would."""
    cfg = composed("sample", f"ckpt={folder / 'outputs' / ckpt}", f"out={folder / out}", *overrides)
    checks.check("sample", cfg)
    return sample(cfg)


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """A folder with an EDM and an iCT run."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(trained / "outputs", folder / "outputs")
    return folder


ICT = ("experiment=smoke_ict", *SHORT)  # the run of the folder


def copy_of_ict(folder, new):
    shutil.copytree(folder / "outputs/smoke_ict", new)
    return new


def test_run_directory(folder):
    directory = folder / "outputs" / "smoke_ict"
    names = {path.name for path in directory.iterdir()}
    assert {"config.yaml", "status.json", "metrics.csv", "checkpoints", "model", "samples"} <= names
    assert json.loads((directory / "status.json").read_text())["state"] == "finished"
    assert {path.name for path in (directory / "samples").iterdir()} == {
        "onestep_000000096.png",
        "twostep_000000096.png",
    }
    assert Image.open(directory / "samples" / "onestep_000000096.png").size == (70, 70)
    assert not [path for path in directory.rglob("*") if "partial" in path.name]


def test_metrics_of_a_run(folder):
    with (folder / "outputs/smoke_ict/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [int(row["images_seen"]) for row in rows] == [16, 32, 48, 64, 80, 96]
    # Six steps in stages of K' = 1: N doubles in each until it is s1 + 1.
    assert [float(row["num_levels"]) for row in rows] == [11, 21, 41, 81, 161, 161]
    assert all(float(row["loss"]) > 0 and float(row["grad_norm"]) > 0 for row in rows)


def test_checkpoint_opens_without_executing_anything(folder):
    checkpoint = torch.load(folder / "outputs/smoke_ict/checkpoints/last.ckpt", weights_only=True)
    progress = {"step": 6, "images_seen": 96, "schedule_step": 6, "batch_size": 16, "first_batch_size": 16}
    assert checkpoint["state_dict"]["progress._extra_state"] == progress
    assert "ConsistencyTraining" in checkpoint["consistency"]["config"]


def test_exported_model_holds_the_first_average(folder):
    exported, info = load_model(folder / "outputs/smoke_ict")
    assert info["weights"] == "ema0.999"
    assert info["images_seen"] == 96
    same, _ = load_model(folder / "outputs/smoke_ict", "ema0.999")
    raw, _ = load_model(folder / "outputs/smoke_ict", "raw")
    assert torch.equal(exported.network.stem.weight, same.network.stem.weight)
    assert not torch.equal(exported.network.stem.weight, raw.network.stem.weight)


def test_finished_run_stays_as_it_is(folder, caplog):
    model = folder / "outputs/smoke_ict/model/model.safetensors"
    before = model.stat().st_mtime_ns
    with caplog.at_level("INFO"):
        again = run(folder, "smoke_ict", *ICT)
    assert again == json.loads((folder / "outputs/smoke_ict/status.json").read_text())["scores"]["loss"]
    assert "finished already" in caplog.text
    assert model.stat().st_mtime_ns == before


@pytest.mark.parametrize(("method", "option"), [("cd", "teacher"), ("ect", "init_from")])
def test_methods_that_start_from_a_diffusion_model(folder, method, option):
    start = folder / "outputs/smoke_edm"
    run(
        folder,
        f"smoke_{method}",
        f"experiment=smoke_{method}",
        f"{option}={start}",
        "trainer.max_steps=1",
        "optimizer.lr=1e-12",
    )
    first, _ = load_model(start)
    trained, info = load_model(folder / f"outputs/smoke_{method}", "raw")
    assert info["images_seen"] == 16
    # With a learning rate of nothing the weights are still the averaged ones of the diffusion model.
    torch.testing.assert_close(trained.network.state_dict(), first.network.state_dict(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parametrization": {"sigma_data": 0.5}}, ["sigma_data 0.5", "data.sigma_data is 0.75"]),
        ({"sigma_min": 0.01}, [r"\(0.01, 80.0\)", r"\(0.002, 80.0\)"]),
        (
            {"network": {"image_size": 16}},
            [r"\[1, 16, 16\]", r"\[1, 8, 8\]", "change data.image_size and data"],
        ),
        ({"network": {"in_channels": 3}}, [r"\[3, 8, 8\]", r"\[1, 8, 8\]"]),
        ({"network": {"num_classes": 7}}, ["network has 7 classes", "data set 10"]),
        ({"kind": "consistency"}, ["must be a diffusion model", "got a consistency model"]),
        ({"kind": "flow_map"}, ["must be a diffusion model", "got a flow_map model"]),
    ],
)
def test_distillation_refuses_a_teacher_that_does_not_fit(folder, tmp_path, change, words):
    settings = load_model(folder / "outputs/smoke_edm")[0].config
    for part in ("network", "parametrization"):
        arguments = settings[part]["arguments"] | change.get(part, {})
        settings[part] = {**settings[part], "arguments": arguments}
    settings |= {key: value for key, value in change.items() if key not in ("network", "parametrization")}
    teacher = save_denoiser(Denoiser.from_config(settings), tmp_path / "teacher", {"method": "EDM", "weights": "raw"})
    with pytest.raises((ValueError, InstantiationException)) as caught:
        run(tmp_path, "cd", "experiment=smoke_cd", f"teacher={teacher}")
    message = str(caught.value.__cause__ or caught.value)
    assert all(re.search(word, message) for word in words), message


def test_distillation_takes_what_its_teacher_has(folder, tmp_path):
    settings = load_model(folder / "outputs/smoke_edm")[0].config
    settings["parametrization"]["arguments"]["noise_scale"] = 250.0
    teacher = save_denoiser(Denoiser.from_config(settings), tmp_path / "teacher", {"weights": "raw"})
    run(tmp_path, "cd", "experiment=smoke_cd", f"teacher={teacher}", "trainer.max_steps=1")
    student, info = load_model(tmp_path / "outputs/cd")
    assert info["method"] == "ConsistencyDistillation"
    assert student.kind == "consistency"
    assert student.parametrization == EDM(sigma_data=0.75, boundary=0.002, noise_scale=250.0)


def test_augmentation_is_for_methods_that_tell_their_network(folder):
    with pytest.raises(ValueError, match=r"augment is on, but ConsistencyTraining .*augment=none, or method=edm"):
        run(folder, "augmented", "experiment=smoke_ict", "augment=edm")


def test_sampler_follows_from_the_kind_of_model(folder):
    """Nothing was asked for: Heun's method on a diffusion model, one step of a consistency model."""
    for ckpt, named in (("smoke_edm", "heun"), ("smoke_ict", "onestep")):
        free, asked = (
            np.load(draw(folder, ckpt, "num_samples=2", *more, out=f"{named}{len(more)}.npz"))["arr_0"]
            for more in ([], [f"sampler={named}"])
        )
        assert (free == asked).all()


def test_start_from_another_network_names_the_options(folder):
    with pytest.raises(ValueError, match="channels is 16 here, 8 there"):
        run(folder, "other", "experiment=smoke_ect", f"init_from={folder}/outputs/smoke_edm", "network.channels=16")


def test_other_data_under_the_same_name_are_refused(folder, tmp_path):
    directory = copy_of_ict(folder, tmp_path / "outputs/mine")
    (directory / "status.json").write_text("{}")  # as if it had been stopped
    checkpoint = torch.load(directory / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["consistency"]["data"]["images"] = 7
    torch.save(checkpoint, directory / "checkpoints/last.ckpt")
    with pytest.raises(ValueError, match="trained on other data \\(7 images then, "):
        run(tmp_path, "mine", *ICT)


def test_other_settings_under_the_same_name_are_refused(folder):
    with pytest.raises(ValueError, match="seed: 0 -> 5") as caught:
        run(folder, "smoke_ict", *ICT, "seed=5")
    assert "overwrite=true" in str(caught.value)


def test_overwrite_sets_the_old_run_aside(folder):
    directory = copy_of_ict(folder, folder / "outputs/twice")
    run(folder, "twice", "experiment=smoke_ict", "trainer.max_steps=1", "overwrite=true")
    assert json.loads((directory / "status.json").read_text())["step"] == 1
    assert json.loads((directory / "previous/1/status.json").read_text())["step"] == 6
    assert (directory / "previous/1/model/model.safetensors").exists()


def test_same_seed_same_weights_however_often_it_is_sampled(folder):
    run(folder, "again", *ICT, "callbacks.sample_grid.every_n_images=16")
    a, b = (load_model(folder / f"outputs/{name}", "raw")[0].state_dict() for name in ("smoke_ict", "again"))
    assert len(list((folder / "outputs/again/samples").glob("onestep_*"))) == 6
    assert all(torch.equal(a[key], b[key]) for key in a if key != "_extra_state")


def test_other_seed_other_weights(folder):
    run(folder, "seed1", *ICT, "seed=1", "callbacks.sample_grid=null")
    a, b = (load_model(folder / f"outputs/{name}")[0].network.stem.weight for name in ("smoke_ict", "seed1"))
    assert not torch.equal(a, b)


def test_wrong_sigma_data_is_warned_about(folder, caplog):
    run(folder, "sd", "experiment=smoke_ict", "data.sigma_data=0.5", "trainer.max_steps=1")
    assert "Set data.sigma_data=0.75" in caplog.text


def test_target_without_its_callback_is_refused(folder):
    with pytest.raises(ValueError, match="TargetEMA"):
        run(folder, "stuck", "experiment=smoke_ct", "callbacks.target_ema=null")


def test_labels_of_samples(folder):
    stored = np.load(draw(folder, "smoke_ict", "num_samples=12", "labels=[3,7]", out="labels.npz"))
    assert stored["arr_1"].tolist() == [3, 7] * 6
    random = np.load(draw(folder, "smoke_ict", "num_samples=200", out="random_labels.npz"))["arr_1"]
    assert set(random.tolist()) == set(range(10))
    with pytest.raises(ValueError, match=r"\[0, 9\], got 10"):
        draw(folder, "smoke_ict", "labels=10")


def test_unconditional_run(folder):
    run(folder, "unconditional", "experiment=smoke_ict", "network.num_classes=0", "trainer.max_steps=1")
    assert np.load(draw(folder, "unconditional", "num_samples=2", out="none.npz")).files == ["arr_0"]
    with pytest.raises(ValueError, match="unconditional"):
        draw(folder, "unconditional", "labels=3")


@pytest.mark.slow
def test_loggers_of_the_extras(folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for logger in ("tensorboard", "wandb", "none"):
        offline = ["logger.wandb.offline=true"] if logger == "wandb" else []
        run(folder, logger, "experiment=smoke_ict", "trainer.max_steps=1", f"logger={logger}", *offline)
    outputs = folder / "outputs"
    assert list((outputs / "tensorboard").rglob("events.out.*"))
    assert list((outputs / "wandb").rglob("*.wandb"))
    assert len((outputs / "wandb/wandb_id.txt").read_text().strip()) == 8
    assert (outputs / "wandb/metrics.csv").exists()
    assert not (outputs / "none/metrics.csv").exists()
    assert list((outputs / "none/samples").iterdir())


def test_samples_do_not_depend_on_the_batch_size(folder):
    a, b = (
        np.load(draw(folder, "smoke_ict", "num_samples=10", "sampler=multistep", f"batch_size={n}", out=f"{n}.npz"))
        for n in (3, 10)
    )
    assert (a["arr_1"] == b["arr_1"]).all()
    assert a["arr_0"].shape == (10, 8, 8, 1)
    assert a["arr_0"].dtype == np.uint8
    # Convolutions of another batch size may round the last bit differently: a grey level at most.
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"].astype(int)).max() <= 1


def test_sample_from_a_checkpoint_into_single_pngs(folder):
    sampler = ("sampler=heun", "sampler.num_steps=3")
    out = draw(folder, "smoke_edm/checkpoints/last.ckpt", "weights=raw", "num_samples=2", *sampler, out="pngs")
    assert sorted(path.name for path in out.iterdir()) == ["00000.png", "00001.png", "sampling.json"]
    assert Image.open(out / "00000.png").size == (8, 8)


@pytest.mark.parametrize(
    ("ckpt", "overrides", "words"),
    [
        ("nowhere", [], "does not exist"),
        ("smoke_edm", ["sampler=onestep"], "diffusion model, which ConsistencySampler cannot sample; use sampler=heun"),
        ("smoke_ict", ["sampler=heun"], "consistency model, which OdeSampler cannot sample; use sampler=onestep"),
        ("smoke_ict", ["sampler=multistep", "sampler.mid_sigmas=[0.5,2]"], r"change sampler\.mid_sigmas"),
        ("smoke_ict", ["weights=ema0.5"], r"ema0\.999"),
        ("smoke_ict", ["num_samples=0"], "num_samples"),
    ],
)
def test_sample_mistakes_are_one_line(folder, ckpt, overrides, words):
    with pytest.raises(ValueError, match=words) as caught:
        draw(folder, ckpt, *overrides)
    assert "\n" not in str(caught.value)


def test_damaged_checkpoint_is_named(folder):
    path = folder / "outputs/damaged.ckpt"
    path.write_bytes(os.urandom(1000))
    with pytest.raises(ValueError, match=r"damaged\.ckpt is not a readable checkpoint"):
        draw(folder, "damaged.ckpt")
