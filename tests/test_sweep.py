"""Multiruns as a user types them; tests/sweeps/ has the parts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

COMMAND = Path(sys.executable).parent / "consistency-train"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SETTINGS = ["-m", "experiment=smoke_ict", "trainer.max_steps=4"]


def command(*overrides, cwd, code=0):
    done = subprocess.run(
        [COMMAND, *SETTINGS, *overrides], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A grid with one broken value (7 channels), and what was said."""
    folder = tmp_path_factory.mktemp("user")
    return folder, command("network.channels=8,7", "seed=0,1", "study_name=grid", cwd=folder, code=1)


def states(folder):
    return {path.parent.name: json.loads(path.read_text()) for path in (folder / "outputs/grid").glob("*/status.json")}


def test_a_failed_run_is_named_and_the_others_go_on(swept):
    folder, said = swept
    runs = states(folder)
    assert sorted(run["state"] for run in runs.values()) == ["failed", "failed", "finished", "finished"]
    assert "2 runs finished, 2 failed" in said
    assert said.count("failed: experiment=smoke_ict trainer.max_steps=4 network.channels=7") == 2
    for name, run in runs.items():
        if run["state"] == "failed":
            assert "channels" in run["error"]
            assert "Traceback" in run["traceback"]
            assert "Traceback" in (folder / "outputs/grid" / name / "train.log").read_text()
            assert "Traceback" not in (folder / "outputs/grid" / name / "console.log").read_text()


def test_the_same_command_skips_what_is_finished_and_tries_the_rest_again(swept):
    folder, _ = swept
    models = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    failed = {path: path.stat().st_mtime_ns for path in folder.rglob("status.json") if "failed" in path.read_text()}
    said = command("network.channels=8,7", "seed=0,1", "study_name=grid", cwd=folder, code=1)
    assert "2 runs finished, 2 failed" in said
    assert {path: path.stat().st_mtime_ns for path in models} == models
    assert all(path.stat().st_mtime_ns > before for path, before in failed.items())
    listed = json.loads((folder / "outputs/grid/study.json").read_text())["runs"]
    assert listed.keys() == states(folder).keys()


def test_nothing_leaks_between_runs_in_one_process(swept):
    """Hydra's own launcher trains both in one process: the second must equal the one that had a process to itself."""
    folder, _ = swept
    command("network.channels=8", "seed=0,1", "study_name=basic", "hydra/launcher=basic", cwd=folder)
    own = load_file(next((folder / "outputs/grid").glob("*-seed1/model/model.safetensors")))
    shared = load_file(next((folder / "outputs/basic").glob("*-seed1/model/model.safetensors")))
    assert all((own[name] == shared[name]).all() for name in own)
    assert len(list((folder / "outputs/basic").glob("*/status.json"))) == 2


def test_other_launchers_and_several_devices(tmp_path):
    """submitit's local executor; two processes a run, which must not start the multirun again."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    several = ["strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    command(*several, "seed=0,1", "study_name=cluster", "hydra/launcher=submitit_local", cwd=tmp_path)
    runs = [json.loads(path.read_text()) for path in (tmp_path / "outputs/cluster").glob("*/status.json")]
    assert [run["state"] for run in runs] == ["finished", "finished"]
    assert {run["images_seen"] for run in runs} == {4 * 16}
    assert len(json.loads((tmp_path / "outputs/cluster/study.json").read_text())["runs"]) == 2
