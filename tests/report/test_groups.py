"""Which runs belong together, and what tells the groups apart."""

import shutil

import pytest

from consistency.report.groups import changes, differences, make_groups
from consistency.report.study import read_study
from consistency.report.tables import changes_table, results_table


def groups_of(folder):
    return make_groups(read_study(folder).runs)


def members(folder):
    return {group.label: [run.folder for run in group.runs] for group in groups_of(folder)}


def test_seeds_make_a_group(two_metrics):
    assert members(two_metrics) == {
        "metric=l2": ["l2-seed0", "l2-seed1"],
        "metric=pseudo_huber": ["pseudo_huber-seed0", "pseudo_huber-seed1"],
    }


def test_only_own_settings_differ(two_metrics):
    """Not method.metric, data.seed or callbacks.quality.dirpath, which follow others."""
    assert differences(groups_of(two_metrics)) == ["metric"]


def test_a_setting_that_another_one_follows_differs_once(study):
    study.run("a", "trainer.max_steps=100", steps=100)
    study.run("b", "trainer.max_steps=200", steps=200)
    assert differences(groups_of(study.note())) == ["trainer.max_steps"]  # not curriculum.num_levels.total_steps


def test_the_same_without_hydras_folder(two_metrics):
    for run in two_metrics.iterdir():
        if run.is_dir():
            shutil.rmtree(run / ".hydra")
    assert differences(groups_of(two_metrics)) == ["metric"]
    assert len(groups_of(two_metrics)) == 2


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
    groups = groups_of(study.note())
    assert [group.axes for group in groups][1] == {"metric": "l2", "optimizer.lr": "1e-2"}
    assert groups[3].label == "metric=pseudo_huber, lr=1e-2"


def test_runs_of_different_commands_differ_in_settings(study):
    study.run("a", "experiment=digits_ict", metric="l2")
    study.run(
        "b", "experiment=digits_ict", "metric=pseudo_huber", "metric.c=0.03", metric="pseudo_huber", c=0.03, lr=0.01
    )
    groups = groups_of(study.note())
    # metric.c comes with the metric and is no choice of its own
    assert [group.axes for group in groups] == [
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
    groups = groups_of(ladder(study, cumulative=cumulative))
    assert [group.label for group in groups] == ["ct", "lr", "huber", "s0", "last"]
    against, listed = changes(groups)
    assert against == reference
    assert listed == [
        [],
        [("optimizer.lr", "0.01", "0.001")],
        [("metric", "l2", "pseudo_huber")],
        [("curriculum.start", "2", "10")],
        None,
    ]


def test_trials_of_a_search_are_points(study):
    for trial, lr in enumerate((0.0095918555, 0.0046630604)):
        typed = (f"variant=trial{trial:03d}", "experiment=digits_ict", f"optimizer.lr={lr}", "sweep=search")
        study.run(f"trial{trial:03d}-x", *typed, variant=f"trial{trial:03d}", lr=lr)
    groups = groups_of(study.note(("late", ["variant=trial002", "experiment=digits_ict", "optimizer.lr=0.5"])))
    assert [group.label for group in groups] == ["trial000", "trial001", "trial002"]
    assert [group.axes["optimizer.lr"] for group in groups] == ["0.009592", "0.004663", "0.5"]
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
    assert changes(groups_of(study.note()))[1][1] == [("metric", "mine.l2", "yours.l2")]


def test_settings_of_a_part_that_is_gone_are_not_listed(study):
    study.run("a", variant="a", metric="pseudo_huber", c=0.03)
    study.run("b", variant="b", metric="l2")
    study.run("c", variant="c", metric="pseudo_huber", c=0.1)
    assert changes(groups_of(study.note()))[1] == [
        [],
        [("metric", "pseudo_huber", "l2")],
        [("metric.c", "0.03", "0.1")],
    ]


def test_null_and_absent_are_the_same(study):
    folder = study.run("a", "seed=0")
    study.run("b", "seed=1", seed=1)
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("_partial_: true", "_partial_: true\n  c: null", 1))
    assert list(members(study.note()).values()) == [["a", "b"]]


def test_settings_that_follow_others_differ_where_these_do(study):
    """`start: ${curriculum.end}` of the constant curriculum, `${curriculum.start}` of the doubling one."""
    from consistency.report.settings import compared_settings
    from consistency.report.study import Run

    settings = {"a": 1, "b": 2}
    runs = [
        Run("x", study.path, settings={**settings, "c": 1}, references={"c": "${a}"}),
        Run("y", study.path, settings={**settings, "c": 2}, references={"c": "${b}"}),
    ]
    first, second = compared_settings(runs)
    assert first != second
    runs[1].references["c"] = "${a}"
    first, second = compared_settings(runs)
    assert first == second
