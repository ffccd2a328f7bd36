"""Which runs a study has."""

import json
from types import SimpleNamespace

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from consistency.sweeps.launcher import LocalLauncher
from consistency.sweeps.study import note_runs, shown
from consistency.sweeps.variants import StudySweeper

VARIANTS = {"a": ["metric=l2"], "b": ["metric=l1", "optimizer.lr=0.1"]}


@pytest.fixture(autouse=True)
def raw_errors(monkeypatch):
    """As the user's `HYDRA_FULL_ERROR=1`: errors as they are."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")


def jobs(tmp_path, *arguments, results=lambda job: JobStatus.COMPLETED, study_name="s", **settings):
    """Overrides of the runs that the sweeper launches."""
    launched = []

    class Launcher(LocalLauncher):
        def launch(self, job_overrides, initial_job_idx):
            launched.extend(job_overrides)
            return [JobReturn(overrides=job, status=results(job), _return_value=1.0) for job in job_overrides]

    sweeper = StudySweeper(**settings)
    sweeper.hydra_context = SimpleNamespace(config_loader=None)
    sweeper.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}, "study_name": study_name})
    sweeper.launcher = Launcher()
    sweeper.sweep(list(arguments))
    return launched


def test_grid(tmp_path):
    assert jobs(tmp_path, "experiment=e", "x=1,2", "y=3,4") == [
        ["experiment=e", f"x={x}", f"y={y}"] for x in (1, 2) for y in (3, 4)
    ]


def test_variants_times_grid(tmp_path):
    """All variants of the first seed come first: half a study can be compared already."""
    assert jobs(tmp_path, "z=9", variants=VARIANTS, params={"seed": "0,1"}) == [
        ["seed=0", "z=9", "variant=a", "metric=l2"],
        ["seed=0", "z=9", "variant=b", "metric=l1", "optimizer.lr=0.1"],
        ["seed=1", "z=9", "variant=a", "metric=l2"],
        ["seed=1", "z=9", "variant=b", "metric=l1", "optimizer.lr=0.1"],
    ]


def test_the_command_line_wins_over_params(tmp_path):
    assert jobs(tmp_path, "seed=7", params={"seed": "0,1"}) == [["seed=7"]]


@pytest.mark.parametrize("argument", ["variant=b", "variant=choice(b)"])
def test_some_variants(tmp_path, argument):
    assert jobs(tmp_path, argument, variants=VARIANTS) == [["variant=b", "metric=l1", "optimizer.lr=0.1"]]


def test_unknown_variant(tmp_path):
    with pytest.raises(ValueError, match="variant must be of a, b, got c"):
        jobs(tmp_path, "variant=a,c", variants=VARIANTS)


def test_a_setting_of_a_variant_cannot_be_given_twice(tmp_path):
    with pytest.raises(ValueError, match=r"variant b sets optimizer\.lr itself"):
        jobs(tmp_path, "optimizer.lr=0.2", variants=VARIANTS)


def test_name_that_cannot_be_a_folder(tmp_path):
    with pytest.raises(ValueError, match="a/b"):
        jobs(tmp_path, variants={"a/b": []})


def test_failed_runs_are_named_at_the_end(tmp_path, caplog):
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as caught:
        jobs(tmp_path, "x=1,2,3", results=lambda job: JobStatus.FAILED if job != ["x=2"] else JobStatus.COMPLETED)
    assert caught.value.code == 1
    assert "1 runs finished, 2 failed" in caplog.text
    assert "failed: x=1" in caplog.text
    assert "failed: x=3" in caplog.text


def test_what_tells_runs_from_each_other():
    runs = [["seed=0", "z=9", "variant=a", "metric=l2"], ["seed=1", "z=9", "variant=b", "metric=l1"]]
    assert shown(runs[0], runs) == "seed=0 variant=a"
    assert shown(["z=9"], [["z=9"]]) == "z=9"


def test_mistakes_end_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as caught:
        jobs(tmp_path, "variant=c", variants=VARIANTS)
    assert caught.value.code == "consistency: variant must be of a, b, got c"


def test_nothing_is_written_outside_of_outputs(tmp_path):
    with pytest.raises(ValueError, match="study_name must be of letters"):
        jobs(tmp_path / "new", study_name="a/../../..")
    assert not (tmp_path / "new").exists()


def test_a_variant_is_a_list(tmp_path):
    with pytest.raises(ValueError, match=r"variants\.a must be a list of overrides"):
        jobs(tmp_path, variants={"a": "metric=l2"})


def test_a_damaged_list_of_runs_is_set_aside(tmp_path, caplog):
    (tmp_path / "study.json").write_text('{"study": "s", "ru')
    note_runs(tmp_path, "s", {"a": ["x=1"]})
    assert "study.json is damaged" in caplog.text
    assert list(json.loads((tmp_path / "study.json").read_text())["runs"]) == ["a"]
    assert len(list(tmp_path.glob("study.damaged-*"))) == 1
