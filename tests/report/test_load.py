"""Run directories as they are, complete and damaged."""

import json

import pytest

from consistency.report.load import read_run, read_study
from consistency.report.tables import state

ONESTEP = "fd_classifier_onestep"


def only_run(folder):
    return read_study(folder).runs.iloc[0]


def curve(folder, score):
    points = read_study(folder).curves
    points = points[points["score"] == score]
    return dict(zip(points["images_seen"], points["value"], strict=True))


def test_study_lists_its_runs_in_order_and_those_that_never_started(study):
    study.run("b", "metric=l2", "seed=0")
    study.run("a", "metric=l2", "seed=1", seed=1)
    found = read_study(study.note(("c", ["metric=l2", "seed=2"])))
    assert list(found.runs.index) == ["b", "a", "c"]
    assert list(found.runs["state"]) == ["finished", "finished", "not started"]
    assert found.runs.loc["c", "seed"] == "2"
    assert found.command == "consistency-train -m metric=l2,pseudo_huber"


def test_scores_are_named_after_the_samplers_and_the_last_is_the_final_one(study):
    study.run("a", scores=(40.0, 20.0, 30.0), twostep=(8.0, 7.0, 9.0))
    found = read_study(study.note())
    assert found.scores == ["fd_classifier_onestep", "fd_classifier_twostep"]
    assert curve(study.path, ONESTEP) == {100: 40.0, 200: 20.0, 300: 30.0}
    assert found.finals.set_index("score")["value"]["fd_classifier_twostep"] == 9.0


def test_scores_of_the_status_stand_in_where_a_score_has_no_row(study):
    folder = study.run("a", scores=(40.0, 20.0))
    study.status("a", state="finished", scores={ONESTEP: 1.0, "fid_heun": 2.0, "odd": [1]})
    values = read_study(study.note()).finals.set_index("score")["value"]
    assert (values[ONESTEP], values["fid_heun"]) == (20.0, 2.0)
    (folder / "quality.jsonl").unlink()
    assert read_study(study.path).finals.set_index("score")["value"][ONESTEP] == 1.0


def test_of_two_rows_of_one_place_the_last_counts(study):
    folder = study.run("a", scores=(40.0, 20.0))
    lines = (folder / "quality.jsonl").read_text().splitlines()
    again = [json.dumps({**json.loads(line), "fd_classifier": 5.0}) for line in lines[2:]]
    (folder / "quality.jsonl").write_text("\n".join([*lines, *again]) + "\n")
    assert curve(study.note(), ONESTEP) == {100: 40.0, 200: 5.0}


@pytest.mark.parametrize("lines", ["{", '{"images_seen": 100, "fd_cla', "[]", "\x00\x00", '{"fd_classifier": 1.0}'])
def test_damaged_lines_are_passed_over_and_counted(study, lines):
    folder = study.run("a", scores=(40.0, 20.0))
    with (folder / "quality.jsonl").open("a") as file:
        file.write(lines)
    run = only_run(study.note())
    assert curve(study.path, ONESTEP)[200] == 20.0
    assert (run.state, run.damage) == ("finished", ("lines of quality.jsonl (1 damaged)",))


def metrics_of(folder, rows):
    (folder / "metrics.csv").write_bytes(rows)
    run, points, _ = read_run("a", folder)
    return run, {name: list(own["value"]) for name, own in points.groupby("score")}


def test_metrics_of_a_killed_run(tmp_path):
    rows = b"step,loss,num_levels,images_seen,fd\n10,0.5,11,100,\n15,,,150,3.0\n20,inf,11,200,\n30,0.2,21,3"
    run, values = metrics_of(tmp_path, rows)
    assert values == {"loss": [0.5, float("inf")], "num_levels": [11.0, 11.0]}
    assert (run.step, run.images_seen) == (20, 200)
    # A row of scores alone is no damage; the last line has no end.
    assert run.damage == ("lines of metrics.csv (1 damaged)",)


@pytest.mark.parametrize(
    ("rows", "damaged"),
    [
        (b"step,loss,images_seen\n1,nan,10\n2,,20\nx\n", 0),
        (b"step,loss,images_seen\n1,0.5,x\n2,x,20\n", 2),
        (b"step,loss,images_seen\n1,0.5,10\n2,0.5,20,7\n", 1),
        (b"step,loss,images_seen\n1,\xff\xfe,10\n", 1),
        (b"\x00,,\n1,2\n", 0),
        (b"", 0),
        (b"step,loss", 1),
    ],
)
def test_damaged_rows_of_metrics_are_counted(tmp_path, rows, damaged):
    run, _ = metrics_of(tmp_path, rows)
    assert run.damage == ((f"lines of metrics.csv ({damaged} damaged)",) if damaged else ())


@pytest.mark.parametrize("found", ["running", "interrupted", "pruned", "failed"])
def test_states_in_words(study, found):
    study.run("a", state=found)
    words = "unfinished" if found == "running" else found
    assert state(only_run(study.note())) == f"{words} at step 20"


def test_error_is_its_last_line(study):
    study.run("a")
    study.status("a", state="failed", step=3, error="CUDA\nout of memory", traceback="Traceback\nX: y")
    assert only_run(study.note()).error == "out of memory"
    study.status("a", state="failed", traceback="Traceback\nX: y")
    assert only_run(study.path).error == "X: y"


@pytest.mark.parametrize("status", [{"state": "failed"}, {"state": "running", "step": 10, "images_seen": 100}])
def test_a_killed_run_is_where_its_last_row_is(study, status):
    study.run("a", scores=(3.0, 2.0, 1.0))
    study.status("a", **status)
    run = only_run(study.note())
    assert (run.step, run.images_seen) == (30, 300)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("status.json", b""),
        ("status.json", b"[1]"),
        ("status.json", b'{"state": "fin'),
        ("status.json", b"\xff\xfe"),
        ("config.yaml", b""),
        ("config.yaml", b"seed: 0\nmetric:\n  _targ"),
        ("config.yaml", b"a: [1\n"),
        ("config.yaml", b"just text\n"),
        ("config.yaml", None),
    ],
)
def test_a_run_with_a_damaged_file_is_unreadable(study, file, content):
    folder = study.run("a")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    assert state(only_run(study.note())) == f"unreadable: {file}"


def test_a_run_that_could_not_be_composed_is_failed(study):
    study.status("invalid-1", state="failed", error="Could not find 'metric/nonsense'")
    run = only_run(study.note(("invalid-1", ["metric=nonsense", "seed=0"])))
    assert (run.state, run.error) == ("failed", "Could not find 'metric/nonsense'")


@pytest.mark.parametrize("content", ["", "[]", '{"runs": [1]}', '{"runs": {"a": 3}, "study": 4}', '{"runs": null}'])
def test_a_damaged_list_of_runs_leaves_the_folders(study, content):
    study.run("a")
    study.run("b", seed=1)
    (study.path / "study.json").write_text(content)
    found = read_study(study.path)
    assert list(found.runs.index) == ["a", "b"]
    assert found.name == "metrics"


def test_plain_folder_and_single_run(study):
    study.run("a", listed=False)
    (study.path / ".hidden").mkdir()
    (study.path / ".hidden" / "status.json").write_text("{}")
    (study.path / "report").mkdir()
    assert list(read_study(study.path).runs.index) == ["a"]
    assert list(read_study(study.path / "a").runs.index) == ["a"]


def test_what_is_no_study_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no folder"):
        read_study(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"no runs in .*: no folder in it has a config.yaml, status.json or metrics.csv$"
    ):
        read_study(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "study.json").write_text("{}")
    with pytest.raises(ValueError, match=r"studies there: mine$"):
        read_study(tmp_path)
