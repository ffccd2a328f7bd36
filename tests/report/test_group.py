"""Which runs belong together, and what tells the groups apart."""

import shutil

import pandas as pd
import pytest

from consistency.report.group import changes, compared_settings, differences, make_groups
from consistency.report.load import read_study
from consistency.report.tables import changes_table, results_table


def groups_of(folder):
    return make_groups(read_study(folder))


def axes_of(folder):
    return list(groups_of(folder).axes.to_dict("index").values())


def different(folder):
    return list(differences(groups_of(folder).settings))


def changes_of(folder):
    groups = groups_of(folder)
    against, listed = changes(groups)
    return against, [listed.get(label) for label in groups.labels]


def members(folder):
    groups = groups_of(folder)
    return {label: list(groups.of(label).index) for label in groups.labels}


def test_seeds_make_a_group(two_metrics):
    assert members(two_metrics) == {
        "metric=l2": ["l2-seed0", "l2-seed1"],
        "metric=pseudo_huber": ["pseudo_huber-seed0", "pseudo_huber-seed1"],
    }


def test_only_own_settings_differ(two_metrics):
    """Not method.metric, data.seed or callbacks.quality.dirpath, which follow others."""
    assert different(two_metrics) == ["metric"]


def test_a_setting_that_another_one_follows_differs_once(study):
    study.run("a", "trainer.max_steps=100", steps=100)
    study.run("b", "trainer.max_steps=200", steps=200)
    assert different(study.note()) == ["trainer.max_steps"]  # not curriculum.num_levels.total_steps


def test_the_same_without_hydras_folder(two_metrics):
    for run in two_metrics.iterdir():
        if run.is_dir():
            shutil.rmtree(run / ".hydra")
    assert different(two_metrics) == ["metric"]
    assert len(groups_of(two_metrics).labels) == 2


def test_settings_are_compared_and_not_what_was_typed(study):
    study.run("a", "optimizer.lr=1e-3", "seed=0")
    study.run("b", "optimizer.lr=0.001", "seed=1", seed=1)
    study.run("c", "seed=2", "optimizer.lr=0.01", seed=2, lr=0.01)
    assert list(members(study.note()).values()) == [["a", "b"], ["c"]]


def test_a_run_that_never_started_joins_those_it_was_typed_with(two_metrics, study):
    study.note(("late", ["experiment=digits_ict", "metric=l2", "seed=7", "run_name=late"]), ("x", ["metric=l1"]))
    found = members(two_metrics)
    assert found["metric=l2"] == ["l2-seed0", "l2-seed1", "late"]
    assert ["x"] in found.values()


def test_a_grid_has_an_axis_a_key(study):
    for metric in ("l2", "pseudo_huber"):
        for lr in ("1e-3", "1e-2"):
            typed = ("experiment=digits_ict", f"metric={metric}", f"optimizer.lr={lr}", "seed=0")
            study.run(f"{metric}-{lr}", *typed, metric=metric, lr=float(lr))
    assert axes_of(study.note())[1] == {"metric": "l2", "optimizer.lr": "1e-2"}
    assert list(members(study.path))[3] == "metric=pseudo_huber, lr=1e-2"


def test_runs_of_different_commands_differ_in_settings(study):
    study.run("a", "experiment=digits_ict", metric="l2")
    study.run(
        "b", "experiment=digits_ict", "metric=pseudo_huber", "metric.c=0.03", metric="pseudo_huber", c=0.03, lr=0.01
    )
    # metric.c comes with the metric and is no choice of its own
    assert axes_of(study.note()) == [
        {"metric": "l2", "optimizer.lr": "0.001"},
        {"metric": "pseudo_huber", "optimizer.lr": "0.01"},
    ]


def ladder(study, *, cumulative):
    plain = {"metric": "l2", "lr": 0.01, "start": 2}
    steps = [("ct", {}), ("lr", {"lr": 0.001}), ("huber", {"metric": "pseudo_huber"}), ("s0", {"start": 10})]
    now = dict(plain)
    for name, change in steps:
        now = {**(now if cumulative else plain), **change}
        typed = ("experiment=digits_ct", "seed=0", f"variant={name}", *(f"{key}={v}" for key, v in change.items()))
        study.run(name, *typed, variant=name, **now)
    return study.note(("last", ["experiment=digits_ct", "seed=0", "variant=last", "metric.c=1"]))


@pytest.mark.parametrize(("cumulative", "reference"), [(True, "the row above"), (False, "the first row")])
def test_variants_say_what_they_change(study, cumulative, reference):
    folder = ladder(study, cumulative=cumulative)
    assert list(members(folder)) == ["ct", "lr", "huber", "s0", "last"]
    steps = ["optimizer.lr: 0.01 → 0.001", "metric: l2 → pseudo_huber", "curriculum.start: 2 → 10"]
    assert changes_of(folder) == (reference, [[], *([step] for step in steps), None])
    rows = {row[0].text: row[1].text for row in changes_table(groups_of(folder)).rows}
    assert (rows["s0"], rows["last"]) == ("start=10", "metric.c=1")  # as it was typed


def test_trials_of_a_search_are_points(study):
    for trial, lr in enumerate((0.0095918555, 0.0046630604)):
        typed = (f"variant=trial{trial:03d}", "experiment=digits_ict", f"optimizer.lr={lr}", "sweep=search")
        study.run(f"trial{trial:03d}-x", *typed, variant=f"trial{trial:03d}", lr=lr)
    groups = groups_of(study.note(("late", ["variant=trial002", "experiment=digits_ict", "optimizer.lr=0.5"])))
    assert groups.labels == ["trial000", "trial001", "trial002"]
    assert list(groups.axes["optimizer.lr"]) == ["0.009592", "0.004663", "0.5"]
    assert results_table(groups, ["fd_classifier_onestep"]).heads[:2] == ["trial", "optimizer.lr"]
    assert changes_table(groups) is None


def test_variants_of_equal_settings_stay_apart(study):
    study.run("a", "variant=base", variant="base")
    study.run("b", "variant=same", variant="same")
    assert members(study.note()) == {"base": ["a"], "same": ["b"]}


def test_equal_names_are_numbered(study):
    study.run("a", "variant=base", variant="base")
    study.status("b", state="failed", error="x")
    study.run("c", "variant=base", "seed=1", variant="base", lr=0.5)
    labels = list(members(study.note(("b", ["variant=base", "data=other"]))))
    assert len(set(labels)) == len(labels)


def test_parts_of_the_same_last_name_are_told_apart(study):
    study.run("a", variant="a", metric="mine.l2")
    study.run("b", variant="b", metric="yours.l2")
    assert changes_of(study.note())[1][1] == ["metric: mine.l2 → yours.l2"]


def test_settings_of_a_part_that_is_gone_are_not_listed(study):
    study.run("a", variant="a", metric="pseudo_huber", c=0.03)
    study.run("b", variant="b", metric="l2")
    study.run("c", variant="c", metric="pseudo_huber", c=0.1)
    assert changes_of(study.note())[1] == [[], ["metric: pseudo_huber → l2"], ["metric.c: 0.03 → 0.1"]]


def test_null_and_absent_are_the_same(study):
    folder = study.run("a", "seed=0")
    study.run("b", "seed=1", seed=1)
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("_partial_: true", "_partial_: true\n  c: null", 1))
    assert list(members(study.note()).values()) == [["a", "b"]]


def test_settings_that_repeat_others_differ_where_these_do():
    """`start: ${curriculum.end}` of the constant curriculum, `${curriculum.start}` of the doubling one."""
    runs = pd.DataFrame({"run": ["x", "y"], "seed": None}, index=["x", "y"])
    runs["config"] = [{"a": 1, "b": 2, "c": 1}, {"a": 1, "b": 2, "c": 2}]
    runs["references"] = [{"c": "${a}"}, {"c": "${b}"}]
    assert list(compared_settings(runs)["c"]) == ["1", "2"]
    runs["references"] = [{"c": "${a}"}, {"c": "${a}"}]
    assert "c" not in compared_settings(runs)


def test_unlike_runs_are_named_by_what_was_typed(study):
    many = {"lr": 0.1, "start": 2, "steps": 7, "metric": "pseudo_huber", "c": 3}
    for index, key in enumerate(many):
        study.run(f"run{index}", "experiment=a", f"{key}=x", **{key: many[key]}, batch_size=index, dropout=index)
    study.run("base", "experiment=b", batch_size=9)
    assert list(members(study.note())) == ["a, lr=x", "a, start=x", "a, steps=x", "a, metric=x", "a, c=x", "b"]
