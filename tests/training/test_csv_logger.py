import csv

import pytest
from lightning.pytorch.utilities import rank_zero_only

from consistency.training.csv_logger import CsvLogger


def read(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write(folder, text):
    (folder / "metrics.csv").write_text(text.replace("\n", "\r\n"), newline="")


def test_one_row_a_step(tmp_path):
    logger = CsvLogger(str(tmp_path / "deep" / "run"))
    logger.log_metrics({"loss": 0.5, "N": 11}, step=10)
    logger.log_metrics({"loss": 0.25, "N": 21}, step=20)
    assert read(tmp_path / "deep" / "run") == [
        {"step": "10", "loss": "0.5", "N": "11"},
        {"step": "20", "loss": "0.25", "N": "21"},
    ]
    assert [path.name for path in (tmp_path / "deep" / "run").iterdir()] == ["metrics.csv"]


def test_columns_that_appear_later(tmp_path):
    logger = CsvLogger(str(tmp_path))
    for step, row in ((1, {"a": 1}), (2, {"b": 3, "a": 2}), (3, {"c": 5}), (4, {"a": 6})):
        logger.log_metrics(row, step=step)
    assert list(read(tmp_path)[0]) == ["step", "a", "b", "c"]
    assert [tuple(row.values()) for row in read(tmp_path)] == [
        ("1", "1", "", ""),
        ("2", "2", "3", ""),
        ("3", "", "", "5"),
        ("4", "6", "", ""),
    ]


def test_announced_columns_are_there_from_the_start(tmp_path):
    logger = CsvLogger(str(tmp_path))
    logger.announce(["loss", "fid"])
    logger.log_metrics({"loss": 1.0, "lr": 0.1}, step=1)
    before = (tmp_path / "metrics.csv").read_bytes()
    logger.log_metrics({"fid": 3.0}, step=2)
    assert (tmp_path / "metrics.csv").read_bytes() == before + b"2,,3.0,\r\n"
    assert before == b"step,loss,fid,lr\r\n1,1.0,,0.1\r\n"


def test_resume_keeps_earlier_rows_and_drops_the_others(tmp_path):
    earlier = CsvLogger(str(tmp_path))
    for step in (10, 20, 30, 100):
        earlier.log_metrics({"loss": step / 10, "old": 1}, step=step)
    again = CsvLogger(str(tmp_path))
    again.log_metrics({"loss": 7.0, "new": 2}, step=20)
    again.log_metrics({"loss": 8.0, "old": 3}, step=30)
    assert [tuple(row.values()) for row in read(tmp_path)] == [
        ("10", "1.0", "1", ""),
        ("20", "7.0", "1", "2"),  # of the step that it resumes from: completed
        ("30", "8.0", "3", ""),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_nothing_is_touched_before_the_first_row(tmp_path):
    CsvLogger(str(tmp_path)).log_metrics({"loss": 1.0}, step=10)
    before = (tmp_path / "metrics.csv").read_bytes()
    again = CsvLogger(str(tmp_path))
    again.log_hyperparams({"seed": 0})
    assert again.experiment is None
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_file_that_is_continued_keeps_its_columns(tmp_path):
    write(tmp_path, "step,loss,lr\n1,0.5,0.1\n")
    logger = CsvLogger(str(tmp_path))
    logger.announce(["loss", "fid"])
    logger.log_metrics({"loss": 1.0, "lr": 0.1}, step=2)
    assert (tmp_path / "metrics.csv").read_bytes() == b"step,loss,lr\r\n1,0.5,0.1\r\n2,1.0,0.1\r\n"
    logger.log_metrics({"fid": 3.0}, step=3)
    assert [row["fid"] for row in read(tmp_path)] == ["", "", "3.0"]


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    earlier = CsvLogger(str(tmp_path))
    for step in (10, 20, 30):
        earlier.log_metrics({"loss": step / 10}, step=step)
    again = CsvLogger(str(tmp_path))
    again.drop_rows_after(20)
    again.log_metrics({"loss": 9.0}, step=50)
    assert [row["step"] for row in read(tmp_path)] == ["10", "20", "50"]


def test_run_from_the_start_begins_afresh(tmp_path):
    CsvLogger(str(tmp_path)).log_metrics({"loss": 1.0}, step=10)
    CsvLogger(str(tmp_path)).log_metrics({"other": 2.0}, step=5)
    assert read(tmp_path) == [{"step": "5", "other": "2.0"}]


@pytest.mark.parametrize("torn", ["30,0.", "30", "", "30,0.5,"])
def test_torn_last_line(tmp_path, torn):
    write(tmp_path, f"step,loss,N\n10,0.5,11\n20,0.25,11\n{torn}")
    CsvLogger(str(tmp_path)).log_metrics({"loss": 0.125, "N": 21}, step=30)
    assert [tuple(row.values()) for row in read(tmp_path)] == [
        ("10", "0.5", "11"),
        ("20", "0.25", "11"),
        ("30", "0.125", "21"),
    ]


def test_line_torn_within_its_step(tmp_path):
    # "3" of "30" is a smaller step, but never was a row.
    write(tmp_path, "step,loss,N\n10,0.5,11\n20,0.25,11\n3")
    CsvLogger(str(tmp_path)).log_metrics({"loss": 0.125, "N": 21}, step=30)
    assert [row["step"] for row in read(tmp_path)] == ["10", "20", "30"]


def test_torn_header(tmp_path):
    write(tmp_path, "step,lo")
    CsvLogger(str(tmp_path)).log_metrics({"loss": 0.5}, step=10)
    assert read(tmp_path) == [{"step": "10", "loss": "0.5"}]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    CsvLogger(str(tmp_path)).log_metrics({"loss": 0.5}, step=10)
    assert list(tmp_path.iterdir()) == []


def test_two_callbacks_make_one_row_of_a_step(tmp_path):
    logger = CsvLogger(str(tmp_path))
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.log_metrics({"loss": 2.0}, step=2)
    logger.log_metrics({"fd": 3.0}, step=2)
    logger.log_metrics({"fd": 4.0, "is": 1.0}, step=2)
    logger.log_metrics({"loss": 5.0}, step=3)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(row["step"], row["loss"], row["fd"], row["is"]) for row in rows] == [
        ("1", "1.0", "", ""),
        ("2", "2.0", "4.0", "1.0"),
        ("3", "5.0", "", ""),
    ]
