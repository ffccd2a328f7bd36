"""Which runs a study has, and how it ends."""

import json
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from consistency.sweeps.grid import StudySweeper
from consistency.sweeps.study import Run, labels, note_runs

VARIANTS = {"a": ["metric=l2"], "b": ["metric=l1", "optimizer.lr=0.1"]}


def jobs(tmp_path, *arguments, errors=None, study_name="s", **settings):
    """Overrides of the runs that the sweeper launches; those in `errors` fail."""
    launched = []

    def launch(jobs):
        launched.extend(jobs)
        return [Run(job, tmp_path / " ".join(job), error=(errors or {}).get(" ".join(job))) for job in jobs]

    sweeper = StudySweeper(**settings)
    sweeper.hydra_context = SimpleNamespace(config_loader=None)
    sweeper.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}, "study_name": study_name})
    sweeper.launch = launch
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


def test_failed_runs_are_named_at_the_end(tmp_path, caplog):
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as caught:
        jobs(tmp_path, "x=1,2,3", errors={"x=1": "no good", "x=3": "no better"})
    assert caught.value.code == 1
    assert "1 runs finished, 2 failed" in caplog.text
    assert "failed: x=1: no good" in caplog.text
    assert "failed: x=3: no better" in caplog.text


def test_what_tells_runs_from_each_other():
    two = [["seed=0", "z=9", "variant=a", "metric=l2"], ["seed=1", "z=9", "variant=b", "metric=l1"]]
    assert labels(two) == ["seed=0 variant=a", "seed=1 variant=b"]
    assert labels([["z=9"]]) == ["z=9"]


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        (["variant=a,c"], {"variants": VARIANTS}, "variant must be of a, b, got c"),
        (["optimizer.lr=0.2"], {"variants": VARIANTS}, "variant b sets optimizer.lr itself; leave it out"),
        ([], {"variants": {"a/b": []}}, "'a/b'; a name has letters"),
        ([], {"variants": {"a": "metric=l2"}}, "hydra.sweeper.variants.a must be a list of overrides"),
        ([], {"study_name": "a/../../.."}, "study_name must be of letters"),
        (["estimate=true"], {}, "estimate=true is for one run"),
        (["lr=interval(1e-4,1e-2)"], {}, "lr=interval(1e-4,1e-2) is a range to search"),
        (["seed=0,1", "lr=tag(log,interval(1e-4,1e-2))"], {}, "add hydra/sweeper=search to search it"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(tmp_path, arguments, settings, words):
    with pytest.raises(SystemExit) as caught:
        jobs(tmp_path / "new", *arguments, **settings)
    assert str(caught.value).startswith("consistency: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_the_list_keeps_runs_of_earlier_commands(tmp_path):
    note_runs(tmp_path, "s", {"a": ["x=1"], "b": ["x=2"]})
    note_runs(tmp_path, "s", {"b": ["x=2"], "c": ["x=3"]})
    assert list(json.loads((tmp_path / "study.json").read_text())["runs"]) == ["a", "b", "c"]


@pytest.mark.parametrize("content", ['{"study": "s", "ru', "[]", '{"runs": {"a": {}}}'])
def test_a_damaged_list_of_runs_is_left_alone(tmp_path, content):
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(ValueError, match=r"study.json is damaged; move it away"):
        note_runs(tmp_path, "s", {"a": ["x=1"]})
    assert (tmp_path / "study.json").read_text() == content
