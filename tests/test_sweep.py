"""Multiruns as a user types them; tests/sweeps/ has the parts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
COMMAND = Path(sys.executable).parent / "consistency-train"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ABLATION = """# @package _global_
# What is right, what cannot be built, what does not compose. ablation=mine
hydra:
  mode: MULTIRUN
  sweeper:
    variants:
      good: [network.channels=8]
      broken: [network.channels=7]
      nothing: [metric=nope]
"""
STUDY = ["--config-dir", "my conf", "experiment=smoke_ict", "ablation=mine", "trainer.max_steps=4", "seed=0,1"]


def command(*overrides, cwd, code=0):
    done = subprocess.run([COMMAND, *overrides], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A study of the user's own with two bad variants of three, and what was said."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "my conf/ablation").mkdir(parents=True)
    (folder / "my conf/ablation/mine.yaml").write_text(ABLATION)
    return folder, command(*STUDY, cwd=folder, code=1)


def states(folder, study):
    return {
        path.parent.name: json.loads(path.read_text()) for path in (folder / "outputs" / study).glob("*/status.json")
    }


def test_a_failed_run_is_named_and_the_others_go_on(swept):
    folder, said = swept
    runs = states(folder, "mine_smoke_ict")
    assert sorted(run["state"] for run in runs.values()) == ["failed"] * 4 + ["finished"] * 2
    assert "2 runs finished, 4 failed" in said
    for seed in (0, 1):
        assert f"failed: seed={seed} variant=broken: ValueError: the noise embedding needs" in said
        assert f"failed: seed={seed} variant=nothing: In 'method/ct': Could not find 'metric/nope'" in said
    for name, run in runs.items():
        if run["state"] == "failed":
            log = (folder / "outputs/mine_smoke_ict" / name / "train.log").read_text()
            assert ("network.channels" in run["error"]) or ("nope" in run["error"])
            assert "Traceback" in run["traceback"]
            assert "Traceback" in log
    listed = json.loads((folder / "outputs/mine_smoke_ict/study.json").read_text())["runs"]
    assert listed.keys() == runs.keys()
    assert sorted(name.split("-")[0] for name in listed) == ["broken"] * 2 + ["good"] * 2 + ["invalid"] * 2


def test_the_same_command_skips_what_is_finished_and_tries_the_rest_again(swept):
    folder, _ = swept
    models = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    failed = {path: path.stat().st_mtime_ns for path in folder.rglob("status.json") if "failed" in path.read_text()}
    assert len(models) == 2
    assert "2 runs finished, 4 failed" in command(*STUDY, cwd=folder, code=1)
    assert {path: path.stat().st_mtime_ns for path in models} == models
    assert all(path.stat().st_mtime_ns > before for path, before in failed.items())


def test_nothing_leaks_between_runs_in_one_process(swept):
    """Hydra's own launcher trains both in one process: the second must equal the one that had a process to itself."""
    folder, _ = swept
    same = ["experiment=smoke_ict", "network.channels=8", "trainer.max_steps=4", "seed=0,1"]
    command("-m", *same, "study_name=basic", "hydra/launcher=basic", cwd=folder)
    own = load_file(next((folder / "outputs/mine_smoke_ict").glob("good-*-seed1/model/model.safetensors")))
    shared = load_file(next((folder / "outputs/basic").glob("*-seed1/model/model.safetensors")))
    assert all((own[name] == shared[name]).all() for name in own)
    assert len(states(folder, "basic")) == 2


def test_a_killed_study_goes_on(tmp_path):
    """SIGKILL of the launcher: what is finished stays, what was under way saves by itself and continues."""
    study = ["-m", "experiment=smoke_ict", "seed=0,1,2", "trainer.max_steps=200", "hydra.launcher.slots=1"]
    launcher = subprocess.Popen([COMMAND, *study], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    outputs, deadline = tmp_path / "outputs/study", time.monotonic() + 600
    while not list(outputs.glob("*-seed1/metrics.csv")) and time.monotonic() < deadline:
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    (first,) = outputs.glob("*-seed0/model/model.safetensors")
    before = first.stat().st_mtime_ns
    said = command(*study, cwd=tmp_path)  # at once: it waits for the run that still saves
    assert "3 runs finished, 0 failed" in said
    runs = states(tmp_path, "study")
    assert [(run["state"], run["step"]) for run in runs.values()] == [("finished", 200)] * 3
    assert first.stat().st_mtime_ns == before
    (log,) = [path.read_text() for path in outputs.glob("*-seed1/train.log")]
    assert "stopped at step" in log
    assert "continuing from" in log


def test_other_launchers_and_several_devices(tmp_path):
    """submitit's local executor; two processes a run, which must not start the multirun again."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    several = ["strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_steps=4"]
    where = ["study_name=cluster", "hydra/launcher=submitit_local"]
    command("-m", "experiment=smoke_ict", *several, "seed=0,1", *where, cwd=tmp_path)
    runs = states(tmp_path, "cluster")
    assert [run["state"] for run in runs.values()] == ["finished", "finished"]
    assert {run["images_seen"] for run in runs.values()} == {4 * 16}
    assert len(json.loads((tmp_path / "outputs/cluster/study.json").read_text())["runs"]) == 2
