"""consistency-evaluate, -curve and -search, from options to files, on the smoke recipes."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from composing import composed
from consistency import save_denoiser
from consistency.commands import checks
from consistency.commands.evaluate import curve, evaluate
from consistency.commands.rundata import _own_parts, data_of
from consistency.commands.sample import sample
from consistency.commands.search import search
from consistency.commands.train import train
from consistency.data.image_files import save_pngs

JOBS = {
    "evaluate": evaluate,
    "curve": curve,
    "search": search,
    "train": train,
    "sample": sample,
}


def run(command, *overrides):
    cfg = composed(command, *overrides)
    job = JOBS[command]
    checks.check(command, cfg)
    return job(cfg)


FEW = "+data.dataset.limit=300"  # a sixth of the digits: their classifier is trained in a second


@pytest.fixture(scope="module")
def user(trained, tmp_path_factory):
    """A folder with an EDM run and an iCT run that logs its quality."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "smoke_edm").symlink_to(trained / "outputs/smoke_edm")
    recipe = ["experiment=digits_ict", FEW, "evaluation.num_samples=64", "trainer.max_steps=6"]
    recipe += ["network.channels=8", "data.batch_size=16", "callbacks.quality.every_n_images=0"]
    where = [f"paths.output_dir={folder / 'smoke_ict'}", f"paths.cache_dir={folder / 'cache'}"]
    run("train", *recipe, "run_name=smoke_ict", *where)  # the smoke recipes measure nothing
    return folder


@pytest.fixture
def measured(user, tmp_path):
    """Options of a cheap measurement of the iCT run."""
    return [
        f"ckpt={user / 'smoke_ict'}",
        f"paths.cache_dir={user / 'cache'}",
        *("evaluation=digits", "evaluation.num_samples=64", "evaluation.batch_size=20"),
        f"out={tmp_path / 'out.json'}",
    ]


def test_run_logs_its_quality(user):
    rows = [json.loads(line) for line in (user / "smoke_ict/quality.jsonl").read_text().splitlines()]
    assert [row["nfe"] for row in rows] == [1, 2]
    assert "fd_classifier_onestep" in (user / "smoke_ict/metrics.csv").read_text()


def test_guidance_costs_a_second_evaluation_and_is_said(user, measured, make_denoiser, tmp_path):
    with pytest.raises(ValueError, match="guidance is 2"):
        run("evaluate", *measured, "guidance=2")
    model = make_denoiser(image_size=8, num_classes=10, label_dropout=0.1)
    save_denoiser(model, tmp_path / "free", {"method": "ConsistencyTraining"})
    options = ["data=digits", FEW, *measured[1:], f"ckpt={tmp_path / 'free'}"]
    (plain,), (guided,) = (run("evaluate", *options, f"guidance={w}")["rows"] for w in (1, 2))
    assert (plain["nfe"], guided["nfe"]) == (1, 2)
    assert ("guidance" in plain, guided["guidance"]) == (False, 2.0)
    assert plain["fd_classifier"] != guided["fd_classifier"]


def test_several_seeds(measured, tmp_path):
    run("evaluate", *measured, "seeds=[0,1,2]", "sampler=multistep")
    report = json.loads((tmp_path / "out.json").read_text())
    values = [row["fd_classifier"] for row in report["rows"]]
    assert len(set(values)) == 3
    assert report["summary"]["fd_classifier"]["mean"] == pytest.approx(np.mean(values))
    assert report["summary"]["fd_classifier"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert report["summary"]["fd_classifier"]["min"] == min(values)
    row = report["rows"][0]
    assert (row["nfe"], row["levels"], row["num_samples"], row["weights"]) == (2, [80.0, 0.821], 64, "ema0.999")
    assert row["reference"] == "digits_8x8_300"


def test_same_numbers_in_any_batch(measured, tmp_path):
    values = []
    for size in (20, 64):
        run("evaluate", *measured, f"evaluation.batch_size={size}")
        values.append(json.loads((tmp_path / "out.json").read_text())["rows"][0]["fd_classifier"])
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_samples_on_disk_give_the_numbers_of_the_model(user, measured, tmp_path):
    run("evaluate", *measured, "seeds=[5]")
    expected = json.loads((tmp_path / "out.json").read_text())["rows"][0]["fd_classifier"]
    for out in ("samples.npz", "samples"):
        run("sample", f"ckpt={user / 'smoke_ict'}", f"out={tmp_path / out}", "num_samples=64", "seed=5")
        options = [option for option in measured if not option.startswith("ckpt")]
        run("evaluate", *options, f"samples={tmp_path / out}", "data=digits", FEW)
        row = json.loads((tmp_path / "out.json").read_text())["rows"][0]
        assert row["fd_classifier"] == pytest.approx(expected, rel=1e-5)


def test_curve(user, measured, tmp_path):
    out = f"out={tmp_path / 'curve.png'}"
    rows = run("curve", *measured, out, "steps=[1,2,4]")
    assert [row["nfe"] for row in rows] == [1, 2, 4]
    assert all(a > b for row in rows for a, b in zip(row["levels"], row["levels"][1:], strict=False))
    assert Image.open(tmp_path / "curve.png").size[0] > 300
    rows = run("curve", *measured, f"ckpt={user / 'smoke_edm'}", out, "heun_steps=[2,3]", "data=digits", FEW)
    assert [row["nfe"] for row in rows] == [3, 5]


def test_search_finds_what_the_scan_finds(measured, tmp_path):
    scan = run("search", *measured, "num_levels=8", "scan=true")
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["points"] for row in report["rows"]] == [[index] for index in range(1, 7)]
    assert scan["fd_classifier"] == min(row["fd_classifier"] for row in report["rows"])
    assert (tmp_path / "out.png").exists()
    found = run("search", *measured, "num_levels=8")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert found in [{**row} for row in rows]
    assert len({tuple(row["points"]) for row in rows}) == len(rows)  # nothing is measured twice
    assert found["fd_classifier"] == min(row["fd_classifier"] for row in rows)


@pytest.mark.parametrize(
    ("command", "overrides", "words"),
    [
        ("evaluate", ["ckpt=null"], "ckpt or samples is neither; allowed: one of them"),
        ("evaluate", ["samples=x.npz"], "ckpt or samples is ckpt and samples"),
        ("evaluate", ["ckpt=null", "samples=tests", "seeds=[1]"], "left out with samples="),
        (
            "evaluate",
            ["ckpt=null", "samples=tests", "compile=true"],
            "compile is True; allowed: left out with",
        ),
        ("evaluate", ["ckpt=nowhere"], "ckpt is nowhere"),
        ("evaluate", ["seeds=[]"], "seeds is"),
        ("evaluate", ["seeds=[1,1]"], "different integers"),
        ("evaluate", ["evaluation.metrics=[fdd]"], "unknown metric fdd"),
        ("evaluate", ["evaluation.allow_few=false"], "64 samples are too few"),
        ("evaluate", ["evaluation.num_samples=0"], "evaluation.num_samples"),
        ("evaluate", ["sampler=heun"], "is a consistency model"),
        ("evaluate", ["evaluation=full", "evaluation.weights=nowhere.pth"], "nowhere.pth is no file"),
        ("search", ["steps=1"], "steps is 1"),
        ("search", ["num_levels=2"], "num_levels is 2"),
        ("search", ["steps=3", "scan=true"], "2 with scan=true"),
        ("curve", ["steps=[0]"], "steps is"),
        ("curve", ["out=curve.pdf"], "ends in .png"),
    ],
)
def test_bad_options_are_one_line(measured, command, overrides, words):
    with pytest.raises(Exception, match=words) as caught:
        run(command, *measured, *(["out=curve.png"] if command == "curve" else []), *overrides)
    cause = caught.value.__cause__ if type(caught.value).__name__ == "InstantiationException" else caught.value
    assert isinstance(cause, ValueError)
    assert "\n" not in str(cause)


def test_model_folder_does_not_say_its_data(user, measured):
    with pytest.raises(ValueError, match=r"does not say what it was trained on; give data=\.\.\. or reference=FILE"):
        run("evaluate", *measured, f"ckpt={user / 'smoke_ict/model'}")


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "os.system"},
        {"_target_": "consistency.data.cache.os.system"},
        {"_target_": "consistency.data.datasets.Path"},
        {"_target_": "consistency.data.cache._write"},
        {"_target_": "consistency.data.module.ImageDataModule", "dataset": {"a": [{"_target_": "builtins.eval"}]}},
        {"_target_": "consistency.data.module.ImageDataModule", "path": "${oc.env:HOME}"},
        {"_target_": 3},
    ],
)
def test_the_settings_of_a_run_that_came_from_elsewhere_make_nothing_else_than_data(tmp_path, node):
    with pytest.raises(ValueError, match=r"asks for .* may run anything; name the data with data="):
        _own_parts(node, tmp_path / "config.yaml")


def test_caches_go_where_this_user_keeps_them(tmp_path):
    # Not where the configuration of somebody else's run says.
    dataset = {
        "_target_": "consistency.data.datasets.image_folder",
        "_partial_": True,
        "path": str(tmp_path / "images"),
    }
    dataset |= {"image_size": 4, "channels": 1, "cache_dir": str(tmp_path / "theirs")}
    node = {"_target_": "consistency.data.module.ImageDataModule", "dataset": dataset, "batch_size": 2, "image_size": 4}
    node |= {"channels": 1, "num_classes": 0, "seed": 0}
    save_pngs(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), tmp_path / "images")
    (tmp_path / "run").mkdir()
    OmegaConf.save(OmegaConf.create({"data": node}), tmp_path / "run" / "config.yaml")
    paths = {"cache_dir": str(tmp_path / "mine"), "data_dir": str(tmp_path / "data")}
    data = data_of(OmegaConf.create({"ckpt": str(tmp_path / "run"), "paths": paths}))
    assert len(data.dataset) == 3
    assert (tmp_path / "mine").exists()
    assert not (tmp_path / "theirs").exists()


def test_the_data_of_our_own_runs_are_made():
    crop = {"_target_": "consistency.data.cropping.adm", "_partial_": True}
    dataset = {"_target_": "consistency.data.datasets.image_folder", "crop": crop}
    node = {"_target_": "consistency.data.module.ImageDataModule", "dataset": dataset}
    assert _own_parts(node, "config.yaml") is node
