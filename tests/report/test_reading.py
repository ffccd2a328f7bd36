"""Run directories as they are, whole and damaged."""

import json
import math

import pytest

from consistency.report.logs import read_metrics, read_quality
from consistency.report.study import read_study


def by_name(folder):
    return {run.folder: run for run in read_study(folder).runs}


def test_study_lists_its_runs_in_order_and_knows_those_that_never_started(study):
    study.run("b", "metric=l2", "seed=0")
    study.run("a", "metric=l2", "seed=1", seed=1)
    found = read_study(study.note(("c", ["metric=l2", "seed=2"])))
    assert [run.folder for run in found.runs] == ["b", "a", "c"]
    assert [run.told for run in found.runs] == ["finished", "finished", "not started"]
    assert found.runs[2].seed == "2"
    assert found.command == "consistency-train -m metric=l2,pseudo_huber"


def test_scores_are_named_after_the_samplers_and_the_last_is_the_final_one(study):
    study.run("a", scores=(40.0, 20.0, 30.0), twostep=(8.0, 7.0, 9.0))
    run = by_name(study.note())["a"]
    assert run.curves["fd_classifier_onestep"] == {100: 40.0, 200: 20.0, 300: 30.0}
    assert run.final("fd_classifier_twostep") == 9.0
    assert read_study(study.path).scores == ["fd_classifier_onestep", "fd_classifier_twostep"]


def test_a_row_says_its_name_itself_where_it_has_one(tmp_path):
    row = {"images_seen": 5, "fid5k_proxy": 1.5, "sampler": "X", "nfe": 35, "name": "heun"}
    (tmp_path / "quality.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "name": None, "sampler": "Y"}))
    curves, _, _ = read_quality(tmp_path / "quality.jsonl", [])
    assert curves == {"fid5k_proxy_heun": {5: 1.5}, "fid5k_proxy_nfe35": {5: 1.5}}


def test_of_two_rows_of_one_place_the_last_counts(study):
    folder = study.run("a", scores=(40.0, 20.0))
    lines = (folder / "quality.jsonl").read_text().splitlines()
    again = [json.dumps({**json.loads(line), "fd_classifier": 5.0}) for line in lines[2:]]
    (folder / "quality.jsonl").write_text("\n".join([*lines, *again]) + "\n")
    run = by_name(study.note())["a"]
    assert run.curves["fd_classifier_onestep"] == {100: 40.0, 200: 5.0}


@pytest.mark.parametrize("lines", ["{", '{"images_seen": 100, "fd_cla', "[]", "\x00\x00", '{"fd_classifier": 1.0}'])
def test_damaged_lines_are_passed_over_and_counted(study, lines):
    folder = study.run("a", scores=(40.0, 20.0))
    with (folder / "quality.jsonl").open("a") as file:
        file.write(lines)
    run = by_name(study.note())["a"]
    assert run.final("fd_classifier_onestep") == 20.0
    assert run.state == "finished"
    assert run.damage == ("lines of quality.jsonl (1 damaged)",)


def test_metrics_of_a_killed_run(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("step,loss,num_levels,images_seen,fd\n10,0.5,11,100,\n15,,,,3.0\n20,nan,11,200,\nx\n30,0.2,21,3")
    loss, levels, step, damaged = read_metrics(file)
    assert list(loss) == [100, 200]
    assert loss[100] == 0.5
    assert math.isnan(loss[200])
    assert levels == {100: 11.0, 200: 11.0}
    assert (step, damaged) == (20, 1)  # x is a row of nothing, as one of scores alone; the last line has no end


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("running", "unfinished at step 20"),
        ("interrupted", "interrupted at step 20"),
        ("pruned", "pruned at step 20"),
        ("failed", "failed at step 20"),
    ],
)
def test_states_in_words(study, state, told):
    study.run("a", state=state)
    assert by_name(study.note())["a"].told == told


def test_error_is_its_last_line(study):
    study.run("a")
    study.status("a", state="failed", step=3, error="CUDA\nout of memory", traceback="Traceback\nX: y")
    assert by_name(study.note())["a"].error == "out of memory"
    study.status("a", state="failed", traceback="Traceback\nX: y")
    assert by_name(study.path)["a"].error == "X: y"


def test_where_a_run_failed_is_in_its_rows_if_not_in_its_status(study):
    study.run("a", scores=(3.0, 2.0, 1.0))
    study.status("a", state="failed", error="x")
    run = by_name(study.note())["a"]
    assert (run.told, run.images_seen) == ("failed at step 30", 300)


def test_a_killed_run_is_where_its_last_row_is(study):
    study.run("a", scores=(3.0, 2.0, 1.0), state="running")
    study.status("a", state="running", step=10, images_seen=100)  # of its last checkpoint
    run = by_name(study.note())["a"]
    assert (run.told, run.images_seen) == ("unfinished at step 30", 300)


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
        ("config.yaml", b"\xff\xfe\n"),
        ("config.yaml", None),
    ],
)
def test_a_run_with_a_damaged_file_is_unreadable(study, file, content):
    folder = study.run("a")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    run = by_name(study.note())["a"]
    assert run.told == f"unreadable: {file}"
    assert not run.is_finished


def test_a_run_that_could_not_be_composed_is_failed(study):
    study.status("invalid-1", state="failed", error="Could not find 'metric/nonsense'")
    (run,) = read_study(study.note(("invalid-1", ["metric=nonsense", "seed=0"]))).runs
    assert (run.told, run.error) == ("failed", "Could not find 'metric/nonsense'")


@pytest.mark.parametrize("content", ["", "[]", '{"runs": [1]}', '{"runs": {"a": 3}, "study": 4}', '{"runs": null}'])
def test_a_damaged_list_of_runs_leaves_the_folders(study, content):
    study.run("a")
    study.run("b", seed=1)
    (study.path / "study.json").write_text(content)
    found = read_study(study.path)
    assert [run.folder for run in found.runs] == ["a", "b"]
    assert found.name == "metrics"


def test_plain_folder_and_single_run(study):
    study.run("a", listed=False)
    (study.path / ".hidden").mkdir()
    (study.path / ".hidden" / "status.json").write_text("{}")
    (study.path / "report").mkdir()
    assert [run.folder for run in read_study(study.path).runs] == ["a"]
    (only,) = read_study(study.path / "a").runs
    assert (only.folder, only.told) == ("a", "finished")


def test_what_is_no_study_is_said_in_one_line(tmp_path):
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
