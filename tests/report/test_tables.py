"""Numbers of the tables, from runs whose numbers are known."""

import math

import pandas as pd
import pytest

from consistency.report.group import make_groups
from consistency.report.load import read_study
from consistency.report.tables import (
    changes_table,
    duration,
    higher_is_better,
    remarks,
    results_table,
    runs_table,
    score_cell,
)
from consistency.training.quality import _higher_is_better

ONESTEP = "fd_classifier_onestep"


def tables(folder):
    study = read_study(folder)
    groups = make_groups(study)
    results = results_table(groups, study.scores)
    return study, groups, [dict(zip(results.heads, (cell.text for cell in row), strict=True)) for row in results.rows]


def test_mean_and_sample_deviation_over_seeds(two_metrics):
    rows = tables(two_metrics)[2]
    assert rows[0] == {
        "metric": "l2",
        "fd_classifier_onestep ↓": "32.0 ± 2.8",
        "fd_classifier_twostep ↓": "16.0 ± 1.4",
        "n": "2",
        "images seen": "200",
        "wall time": "1 min 00 s",
        "runs": "2 finished",
    }


@pytest.mark.parametrize("state", ["failed", "interrupted", "pruned", "running"])
def test_runs_that_are_not_finished_do_not_enter_means(two_metrics, study, state):
    typed = ("experiment=digits_ict", "metric=l2", "seed=2")
    study.run("l2-seed2", *typed, seed=2, metric="l2", scores=(9000.0, 9000.0), state=state)
    found, groups, rows = tables(study.note())
    assert rows[0]["fd_classifier_onestep ↓"] == "32.0 ± 2.8"
    assert rows[0]["n"] == "2"
    words = f"{'unfinished' if state == 'running' else state} at step 20"
    assert rows[0]["runs"] == f"2 finished, 1 {words}"
    assert f"4 of 5 runs are finished; 1 {words}. Means are over finished runs only." in remarks(
        found, groups, [ONESTEP]
    )


@pytest.mark.parametrize(
    ("values", "text", "order"),
    [
        ([], "-", None),
        ([31.25], "31.2", 31.25),
        ([2206.1, 2267.3, 2224.0], "2,232 ± 31", None),
        ([8.1, 5.7, 7.3], "7.0 ± 1.2", None),
        ([0.0123, 0.0125], "0.01240 ± 0.00014", None),
        ([5.0, 5.0], "5.000 ± 0.000", 5.0),
        ([5.0, math.nan], "5 (+1 nan)", math.inf),
        ([math.inf, 5.0, 7.0], "6.0 ± 1.4 (+1 inf)", math.inf),
        ([math.nan, math.nan], "2 nan", math.inf),
    ],
)
def test_a_score_with_its_spread(values, text, order):
    cell = score_cell(ONESTEP, pd.Series(values, dtype=float))
    assert cell.text == text
    if values and order is not None:
        assert cell.order == order


def test_diverged_is_the_worst_of_a_score_of_which_more_is_better():
    assert score_cell("precision5k_onestep", pd.Series([math.nan])).order == -math.inf


@pytest.mark.parametrize("name", ["fid50k", "is5k", "precision5k", "recall50k", "fd_classifier", "kid5k", "loss"])
def test_the_direction_of_a_score_is_that_of_training(name):
    assert higher_is_better(f"{name}_onestep") == _higher_is_better(f"{name}_onestep")


def test_diverged_runs_are_shown(study):
    study.run("a", "seed=0", scores=(3.0, math.nan))
    study.run("b", "seed=1", seed=1, scores=(3.0, 2.0))
    found, groups, rows = tables(study.note())
    assert rows[0]["fd_classifier_onestep ↓"] == "2 (+1 nan)"
    assert any(line.startswith("Ended with nan or inf: a.") for line in remarks(found, groups, [ONESTEP]))
    runs = runs_table(found, groups, [ONESTEP])
    assert [cell.text for cell in runs.rows[0]][4:6] == ["1 nan", "3 at 100"]


def test_different_budgets_and_protocols_are_said(study):
    study.run("a", "seed=0", scores=(3.0, 2.0))
    study.run("b", "seed=1", seed=1, scores=(3.0, 2.0, 1.0), about={"num_samples": 5000})
    found, groups, rows = tables(study.note())
    said = " ".join(remarks(found, groups, [ONESTEP]))
    assert "different numbers of images (200, 300)" in said
    assert "measured with different num_samples" in said
    assert rows[0]["images seen"] == "200 to 300"


def test_the_best_in_training_follows_the_direction_of_the_score(study):
    folder = study.run("a", "seed=0", scores=(3.0, 1.0, 2.0))
    lines = (folder / "quality.jsonl").read_text().replace("fd_classifier", "recall5k").splitlines(keepends=True)
    (folder / "quality.jsonl").write_text((folder / "quality.jsonl").read_text() + "".join(lines))
    found, groups, _ = tables(study.note())
    (row,) = runs_table(found, groups, [ONESTEP, "recall5k_onestep"]).rows
    assert [cell.text for cell in row[4:8]] == ["2", "1 at 200", "2", "3 at 100"]


def test_a_whole_study_has_nothing_to_say(two_metrics):
    found, groups, _ = tables(two_metrics)
    assert remarks(found, groups, found.scores) == []


def test_without_scores_the_loss_stands_in(study):
    (study.run("a") / "quality.jsonl").unlink()
    found, groups, rows = tables(study.note())
    assert rows[0]["loss ↓"] == "0.25"
    assert any("callbacks=quality" in line for line in remarks(found, groups, found.scores))


def test_a_row_a_run_with_its_error(two_metrics, study):
    study.run("bad", "metric=l2", "seed=3", seed=3, state="failed")
    study.status("bad", state="failed", step=5, error="FloatingPointError: the loss is nan")
    table = runs_table(*tables(study.note())[:2], [ONESTEP])
    bad = next(row for row in table.rows if row[0].text == "bad")
    assert bad[3].text == "failed at step 5"
    assert bad[-1].text == "FloatingPointError: the loss is nan"
    assert len(table.rows) == 5


def test_changes_are_listed_where_columns_do_not_say_them(two_metrics, study):
    assert changes_table(tables(two_metrics)[1]) is None
    study.run("v", "variant=x", variant="x", metric="l2", lr=0.5)
    table = changes_table(tables(study.note())[1])
    assert table is not None
    assert table.rows[-1][2].text == "optimizer.lr: 0.001 → 0.5"


@pytest.mark.parametrize(
    ("seconds", "text"), [(51.6, "52 s"), (252, "4 min 12 s"), (11100, "3 h 05 min"), (math.nan, "-")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
