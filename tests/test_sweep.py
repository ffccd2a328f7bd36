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
      first: []
      broken: [network.channels=7]
      nothing: [metric=nope]
      second: [seed=1]
"""
SMALL = ["experiment=smoke_ict", "callbacks.sample_grid=null"]
STUDY = ["--config-dir", "my conf", *SMALL, "ablation=mine", "trainer.max_steps=200", "hydra.launcher.slots=1"]


def command(*overrides, cwd, code=0):
    done = subprocess.run([COMMAND, *overrides], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def states(folder):
    """Run -> its status."""
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/status.json")}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A study of the user's own, whose launcher is killed while its last run trains: its folder, and when that was."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "my conf/ablation").mkdir(parents=True)
    (folder / "my conf/ablation/mine.yaml").write_text(ABLATION)
    launcher = subprocess.Popen([COMMAND, *STUDY], cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    study, deadline = folder / "outputs/mine_smoke_ict", time.monotonic() + 600
    while not list(study.glob("second-*/metrics.csv")) and time.monotonic() < deadline:
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    return study, time.time_ns()


@pytest.fixture(scope="module")
def swept(killed):
    """The same study after the same command, at once: it waits for the run that still saves; and what it printed."""
    study, _ = killed
    return study, command(*STUDY, cwd=study.parents[1], code=1)


def test_a_killed_study_goes_on(killed, swept):
    """What is finished stays, what failed is tried again, what was under way has saved by itself and continues."""
    study, killed_at = killed
    runs = {name.split("-")[0]: name for name in states(study)}
    assert {(name, states(study)[run]["state"]) for name, run in runs.items()} == {
        *(("first", "finished"), ("broken", "failed"), ("second", "finished"))
    }
    assert (study / runs["first"] / "model/model.safetensors").stat().st_mtime_ns < killed_at
    assert (study / runs["broken"] / "status.json").stat().st_mtime_ns > killed_at
    log = (study / runs["second"] / "train.log").read_text()
    assert "stopped at step" in log
    assert "continuing from" in log
    assert states(study)[runs["second"]]["step"] == 200
    assert json.loads((study / "study.json").read_text())["runs"].keys() == set(runs.values())


def test_failed_runs_are_named(swept):
    study, printed = swept
    assert "2 runs finished, 2 failed" in printed
    assert "failed: variant=broken: ValueError: the noise embedding needs" in printed
    assert "failed: variant=nothing: In 'method/ct': Could not find 'metric/nope'" in printed
    [broken] = study.glob("broken-*")
    status = json.loads((broken / "status.json").read_text())
    assert "network.channels" in status["error"]
    assert "Traceback" in status["traceback"]
    assert "Traceback" in (broken / "train.log").read_text()


def test_nothing_leaks_between_runs_in_one_process(swept):
    """Hydra's own launcher trains both in one process: the second must equal the one that had a process to itself."""
    study, _ = swept
    same = [*SMALL, "variant=second", "seed=1", "trainer.max_steps=3,200"]
    command("-m", *same, "study_name=basic", "hydra/launcher=basic", cwd=study.parents[1])
    own = load_file(next(study.glob("second-*/model/model.safetensors")))
    [shared] = [run for run, status in states(study.parent / "basic").items() if status["step"] == 200]
    shared = load_file(study.parent / "basic" / shared / "model/model.safetensors")
    assert all((own[name] == shared[name]).all() for name in own)


def test_other_launchers_and_several_devices(tmp_path):
    """submitit's local executor; two processes a run, which must not start the multirun again."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    several = ["strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_steps=4"]
    where = ["study_name=cluster", "hydra/launcher=submitit_local"]
    printed = command("-m", *SMALL, *several, "metric=l2,nope", *where, cwd=tmp_path, code=1)
    [run] = states(tmp_path / "outputs/cluster").values()
    assert (run["state"], run["images_seen"]) == ("finished", 4 * 16)
    assert "failed: metric=nope: In 'method/ct': Could not find 'metric/nope'" in printed
