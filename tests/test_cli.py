"""The commands as a user types them: subprocesses, in an empty folder."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import forked
from consistency import cli
from consistency.checkpoints.native import save_denoiser
from consistency.commands.rules import RULES

BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(name, *overrides, cwd, code=0):
    done = subprocess.run(
        [BIN / name, *overrides], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_interrupted_run_continues_to_the_same_weights(tmp_path):
    """Ctrl-C between the micro-batches of a run with dropout, a moving target and two averages."""
    settings = [
        "experiment=smoke_ct",
        "trainer.max_steps=60",
        "network.dropout=0.1",
        "trainer.accumulate_grad_batches=2",
        "callbacks.checkpoint.every_n_steps=1000",
    ]
    said = forked.command("train", *settings, "run_name=straight", cwd=tmp_path)
    assert "sample from it  consistency-sample ckpt=outputs/straight" in said
    process = subprocess.Popen(
        [BIN / "consistency-train", *settings, "run_name=stopped"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step 30/60"):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=600) == 130
    status = json.loads((tmp_path / "outputs/stopped/status.json").read_text())
    assert status["state"] == "interrupted"
    assert 30 <= status["step"] < 60
    assert "continuing from" in forked.command("train", *settings, "run_name=stopped", cwd=tmp_path)

    straight, stopped = (
        torch.load(tmp_path / f"outputs/{name}/checkpoints/last.ckpt", weights_only=True)
        for name in ("straight", "stopped")
    )
    assert_same(straight["state_dict"], stopped["state_dict"])
    assert_same(straight["callbacks"]["WeightEMA"], stopped["callbacks"]["WeightEMA"])
    assert_same(straight["optimizer_states"][0]["state"], stopped["optimizer_states"][0]["state"])
    losses = [
        [row["loss"] for row in csv.DictReader((tmp_path / f"outputs/{name}/metrics.csv").open())]
        for name in ("straight", "stopped")
    ]
    assert len(losses[0]) == 15
    assert losses[0] == losses[1]

    said = forked.command("sample", "ckpt=outputs/stopped", "num_samples=4", "out=few.png", cwd=tmp_path)
    assert "4 images" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.png", "outputs"]


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["experiment=digits_cd", "teacher=nowhere"], ["teacher", "nowhere", "consistency-train experiment="]),
        pytest.param(
            *(["metric=lpips", "metric.backbone=nowhere.pth"], ["consistency: ", "nowhere.pth"]), marks=pytest.mark.slow
        ),
        (["metric=nope"], ["nope", "pseudo_huber"]),
        pytest.param(["trainer.max_step=3"], ["max_step"], marks=pytest.mark.slow),
        pytest.param(["logger=null"], ["logger is null", "csv", "~logger"], marks=pytest.mark.slow),
    ],
)
def test_configuration_errors_are_short(tmp_path, overrides, words):
    said = command("consistency-train", *overrides, cwd=tmp_path, code=2)
    assert all(word in said for word in words), said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("draw=lognormal", "levels=lognormal"),
        ("draw.q=4,256", "levels.q=4,256"),
        ("+draw.x={a: 1}", "+levels.x={a: 1}"),
        ("~draw.index", "~levels.index"),
        ("noise.rho=5", "levels.rho=5"),
        ("noise.sigma_data=0.6", "data.sigma_data=0.6"),
        ("noise.noise_scale=250", "parametrization.noise_scale=250"),
        ("noise.sigma_min=0.01", "model.sigma_min=0.01"),
        ("network.label_dropout=0.1", "model.label_dropout=0.1"),
        ("denoiser@method.denoiser=flow", "parametrization=flow"),
        ("method.denoiser.boundary=0", "parametrization.boundary=0"),
        ("method.draw.q=4", "method.levels.q=4"),
    ],
)
def test_options_of_the_version_before_still_work(capsys, old, new):
    assert cli._renamed(old) == new
    said = capsys.readouterr().err
    bare_old, bare_new = (option.lstrip("+~").partition("=")[0] for option in (old, new))
    assert said == f"consistency: {bare_old} is called {bare_new} now; the old name goes with the next version\n"


@pytest.mark.parametrize(
    "option", ["drawing=1", "levels=ratio", "data.noise=1", "network.dropout=0.1", "-m", "noise_=1"]
)
def test_other_options_stay_as_they_are(capsys, option):
    assert cli._renamed(option) == option
    assert capsys.readouterr().err == ""


def test_renamed_options_reach_the_run(tmp_path):
    old = ["draw=uniform_index", "noise.sigma_data=0.6", "noise.noise_scale=1", "noise.sigma_max=70"]
    done = subprocess.run(
        [BIN / "consistency-train", *old, "--cfg", "job", "--resolve"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(" is called ")[0] for line in done.stderr.splitlines()] == [
        f"consistency: {option.partition('=')[0]}" for option in old
    ]
    settings = yaml.safe_load(done.stdout)
    assert settings["levels"]["index"]["_target_"].endswith("uniform_index")
    assert settings["data"]["sigma_data"] == settings["method"]["denoiser"]["parametrization"]["sigma_data"] == 0.6
    assert settings["method"]["denoiser"]["parametrization"]["noise_scale"] == 1
    assert settings["model"]["sigma_max"] == settings["levels"]["sigma_max"] == 70
    assert settings["trainer"]["max_steps"] == 1500  # no recipe was named: the small one


@pytest.mark.slow
def test_number_of_steps_is_asked_for_where_no_recipe_says_it(tmp_path):
    said = command("consistency-train", "experiment=null", cwd=tmp_path, code=2)
    assert "trainer.max_steps" in said
    assert "Traceback" not in said


def test_help_does_not_import_torch():
    code = "import sys, consistency, consistency.cli; assert not {'torch', 'lightning'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_sampling_loads_neither_the_compiler_nor_lightning(make_denoiser, tmp_path):
    save_denoiser(make_denoiser(), tmp_path / "model", {"method": "ConsistencyTraining"})
    code = (
        "import sys; from consistency.cli import sample; sample(); "
        "assert not {'torch._dynamo', 'lightning', 'torchvision', 'scipy', 'sklearn', 'matplotlib'} & set(sys.modules)"
    )
    options = [f"ckpt={tmp_path / 'model'}", f"out={tmp_path / 'a.png'}", "num_samples=2", "device=cpu"]
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").exists()


@pytest.mark.slow
def test_editing_and_measuring_images_of_ones_own_load_no_lightning():
    code = "import sys, consistency.commands.edit, consistency.commands.evaluate; assert 'lightning' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_finished_run_is_recognised_before_anything_heavy_is_imported(tmp_path):
    run = tmp_path / "outputs" / "smoke_ict"
    (run / "model").mkdir(parents=True)
    (run / "status.json").write_text('{"state": "finished"}')
    (run / "model" / "config.json").write_text("{}")
    code = (
        "import sys; from consistency.cli import train; train(); assert not {'torch', 'lightning'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "experiment=smoke_ict", f"hydra.run.dir={run}", f"paths.output_dir={run}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is finished already" in done.stdout


@pytest.mark.parametrize(
    ("load", "given", "policy"),
    [
        (0.3, {}, None),
        (2.0, {}, "passive"),
        (2.0, {"OMP_WAIT_POLICY": "active"}, "active"),
        (2.0, {"KMP_BLOCKTIME": "1"}, None),
    ],
)
def test_waiting_threads_sleep_on_a_busy_machine(monkeypatch, load, given, policy):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    cli.let_waiting_threads_sleep()
    found = os.environ.pop("OMP_WAIT_POLICY", None)
    assert found == policy


@pytest.mark.parametrize("name", sorted(RULES))
def test_help_is_the_page_of_the_command(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"consistency-{name}", "seed=1", "--help"])
    getattr(cli, name)()
    page = capsys.readouterr().out
    first, _, _, *lines = page.splitlines()
    assert first.startswith(f"consistency-{name}: ")
    assert sum(line.startswith(f"  consistency-{name} ") for line in lines) == 3
    options = [line.split("=")[0].strip() for line in lines if re.match(r"  \w+=", line)]
    missing = {option.partition(".")[0] for option in RULES[name]} - set(options)
    assert not missing


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("sample", "num_sample=5", "there is no option num_sample here; did you mean num_samples?"),
        ("sample", "+num_sample=5", "there is no option num_sample; did you mean num_samples?"),
        ("sample", "++nonsense=5", "there is no option nonsense"),
        ("sample", "sampler=multistp", "sampler is multistp; allowed: ancestral, dpm2"),
        ("train", "trainer.max_step=3", "no option trainer.max_step here; did you mean trainer.max_steps?"),
        ("train", "experiment=digits_ic", "did you mean digits_ict?"),
        ("train", "logger=null", "logger is null; allowed: csv"),
    ],
)
def test_what_does_not_exist_is_one_line_with_what_was_meant(name, override, words, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", [f"consistency-{name}", override, "ckpt=x"] if name == "sample" else ["x", override]
    )
    with pytest.raises(SystemExit) as end:
        getattr(cli, name)()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert words in said
    assert "append" not in said  # Hydra's hint to add what nothing reads
    assert len(said.splitlines()) == 1
    assert os.environ.get("HYDRA_FULL_ERROR", "0") == "0"


@pytest.mark.slow
def test_the_mathematics_loads_neither_lightning_nor_hydra():
    code = (
        "import sys; from consistency import Denoiser, UNet, add_noise, register_network, ConsistencySampler; "
        "assert not {'lightning', 'hydra', 'omegaconf', 'torchvision'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
