"""One run from its start to its end, with small functions in place of trainings."""

import json
import logging
import os

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from consistency.commands import start as module
from consistency.commands.folder import RefusedError, objective_of, status_of, write_status
from consistency.commands.start import command_of, environment_of_run, start
from consistency.io.run_dir import locked


@pytest.fixture
def cfg(tmp_path):
    return OmegaConf.create({"paths": {"output_dir": str(tmp_path)}, "overwrite": False, "objective": None})


def fails(error):
    def job():
        raise error

    return job


@pytest.mark.parametrize("state", [None, "running", "interrupted", "failed"])
def test_a_failure_is_written_down_at_once(cfg, tmp_path, state):
    if state is not None:
        write_status(tmp_path, state=state, step=7, error="OLD")
    handler = logging.FileHandler(tmp_path / "train.log")
    logging.getLogger().addHandler(handler)
    try:
        with pytest.raises(ValueError, match="no good"):
            start(cfg, fails(ValueError("no good\nat all")))
    finally:
        logging.getLogger().removeHandler(handler)
    status = status_of(tmp_path)
    assert status["state"] == "failed"
    assert status["error"] == "ValueError: no good"
    assert "Traceback" in status["traceback"]
    assert status.get("step") == (None if state is None else 7)
    assert "Traceback" in (tmp_path / "train.log").read_text()


def test_divergence_is_told_apart(cfg, tmp_path):
    with pytest.raises(FloatingPointError):
        start(cfg, fails(FloatingPointError("nan")))
    assert status_of(tmp_path)["diverged"] is True


@pytest.mark.parametrize("state", ["finished", "pruned"])
def test_what_is_over_is_not_done_again(cfg, tmp_path, monkeypatch, state):
    monkeypatch.setattr(module, "log_outputs", lambda run_dir, imports: None)
    write_status(tmp_path, state=state, objective=1.0, scores={"a": 1.0, "b": 2.0})
    assert start(cfg, fails(AssertionError)) == 1.0
    cfg.objective = "b"
    assert start(cfg, fails(AssertionError)) == 2.0
    cfg.objective = "c"
    with pytest.raises(RefusedError, match="objective=c was not measured by this run, which has a, b"):
        start(cfg, fails(AssertionError))
    assert status_of(tmp_path)["state"] == state


def test_other_ranks_of_a_finished_run_do_not_wait_for_the_first(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "log_outputs", lambda run_dir, imports: None)
    monkeypatch.setenv("RANK", "1")
    assert start(cfg, lambda: 5.0) == 5.0
    write_status(tmp_path, state="finished", objective=1.0)
    assert start(cfg, fails(AssertionError)) == 1.0


def test_a_run_under_way_is_left_alone(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_FOR_THE_LAST", 0.2)
    write_status(tmp_path, state="running")
    with locked(tmp_path / "run"), pytest.raises(RefusedError, match=f"in use by process {os.getpid()}.*run_name=NAME"):
        start(cfg, fails(AssertionError))
    assert status_of(tmp_path) == {"state": "running"}


def test_a_timeout_of_the_job_is_not_that_of_the_lock(cfg):
    with pytest.raises(TimeoutError, match="download"):
        start(cfg, fails(TimeoutError("download timed out")))


def test_damaged_status_is_taken_as_none(cfg, tmp_path, caplog):
    (tmp_path / "status.json").write_text('{"state": "fin')
    assert start(cfg, lambda: 3.0) == 3.0
    assert "status.json cannot be read" in caplog.text


def test_objective_of_a_run():
    assert objective_of({}, None) is None
    assert objective_of({"objective": 2.0, "scores": {"a": 2.0, "b": 3.0}}, "b") == 3.0


def test_command_of_a_run(tmp_path):
    """Reads back as what was given, in one run and not in a multirun."""
    source = {"main": "/conf", "hydra": "pkg://x", "command-line": "/my conf"}
    hydra = OmegaConf.create(
        {
            "runtime": {"config_sources": [{"provider": name, "path": path} for name, path in source.items()]},
            "job": {"config_name": "train"},
            "overrides": {
                "hydra": [
                    *("hydra.mode=MULTIRUN", "hydra/launcher=local", "hydra.launcher.slots=2", "hydra.sweep.dir=x"),
                    *("hydra/sweeper=study", "hydra.verbose=true"),
                ]
            },
        }
    )
    given = ["ablation=mine", "a=[1,2]", "b={c:1,d:'x, y'}", "e='it\\'s = here'"]
    command = command_of(hydra, given, tmp_path / "it's, here=1", "my study")
    assert command[3:9] == ["--config-path", "/conf", "--config-name", "train", "--config-dir", "/my conf"]
    parsed = OverridesParser.create().parse_overrides(command[9:])
    values = {override.key_or_group: getattr(override.value(), "text", override.value()) for override in parsed}
    assert not any(override.is_sweep_override() for override in parsed)
    assert values["hydra.mode"] == "RUN"
    assert values["hydra.run.dir"] == str(tmp_path / "it's, here=1")
    assert values["study_name"] == "my study"
    assert values["hydra.verbose"] is True
    assert {"hydra/launcher", "hydra.launcher.slots", "hydra/sweeper", "hydra.sweep.dir"}.isdisjoint(values)
    assert values["e"] == "it's = here"


def test_environment_of_a_run(monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    environment = environment_of_run(CUDA_VISIBLE_DEVICES="3")
    assert "WANDB_RUN_ID" not in environment
    assert environment["SLURM_JOB_NAME"] == "interactive"
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"


def test_status_has_no_empty_fields(tmp_path):
    write_status(tmp_path, state="running", error=None)
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "running"}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
