"""W&B's copy of the metrics: real offline runs, read back from what W&B wrote; killed, cut off, refused, unplugged."""

import csv
import json
import logging
import os
import signal
import struct
import subprocess
import time
import zlib
from collections import Counter
from contextlib import suppress
from types import SimpleNamespace

import pytest
import wandb
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from composing import composed
from consistency.commands import tracking
from consistency.commands import train as runs_train
from consistency.commands.start import start
from consistency.commands.train import train
from consistency.training.csv_logger import CsvLogger
from consistency.training.wandb_logger import WandbLogger
from consistency.training.wandb_segments import AXES, read_segments

SMALL = (
    *("experiment=smoke_ict", "logger=wandb", "logger.wandb.offline=true", "trainer.max_steps=12"),
    *("data.batch_size=4", "callbacks.log.every_n_steps=2", "callbacks.checkpoint.every_n_steps=4"),
    *("callbacks.sample_grid.every_n_images=12", "callbacks.sample_grid.num_samples=1"),
)


class Killed(BaseException):
    """In place of SIGKILL: nothing of ours catches it."""


class Scores(Callback):
    """Logs as `QualityCallback` does, without `images_seen`; every third step, with and without a row of losses."""

    fails_at = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = pl_module.progress.step
        if step == self.fails_at:
            raise RuntimeError("no memory for the scores")
        if step % 3 == 0:
            for logger in trainer.loggers:
                logger.log_metrics({"fd_classifier_onestep": 1 / step}, step=step)


class At(Callback):
    """Does something after a step that the others have logged."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.progress.step == self.step:
            self.action()


def kill_wandb():
    """SIGKILL to W&B's own process, whose memory holds what is not on disk yet."""
    listed = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb"], capture_output=True, text=True, check=True)
    for child in listed.stdout.split():
        os.kill(int(child), signal.SIGKILL)
    time.sleep(0.2)


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.setenv("WANDB_X_SAVE_REQUIREMENTS", "false")  # it takes half a second
    yield
    for end in (wandb.finish, wandb.teardown):
        with suppress(Exception):
            end()


@pytest.fixture(scope="module")
def small():
    return composed("train", *SMALL, "paths.output_dir=unused")


@pytest.fixture
def job(tmp_path, monkeypatch, small):
    """Train NAME under the folder of the test, with further callbacks after the others; returns its run directory."""
    parts = runs_train.build_parts

    def run(name="run", *settings, callbacks=()):
        def with_more(group):
            return [*parts(group), Scores(), *callbacks] if "weight_ema" in group else parts(group)

        directory = tmp_path / name
        paths = [f"run_name={name}", f"paths.output_dir={directory}", f"paths.cache_dir={tmp_path}/cache"]
        cfg = OmegaConf.merge(small, OmegaConf.from_dotlist([*paths, *settings]))
        with monkeypatch.context() as patch:
            patch.setattr(runs_train, "build_parts", with_more)
            start(cfg, lambda: train(cfg))
        return directory

    return run


def records(path):
    """All records of a file of W&B. Written anew, with checksums, so that the logger's own reader is not trusted."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        checksum, size, kind = struct.unpack_from("<IHB", data, position)
        part = data[position + 7 : position + 7 + size]
        assert zlib.crc32(part, zlib.crc32(bytes([kind]))) == checksum
        parts, position = parts + part, position + 7 + size
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def files(directory):
    return sorted(directory.glob("wandb/*run-*/*.wandb"))


def rows(directory):
    """Rows of all sessions in order, name -> value; of pictures the file names."""
    found = []
    for record in (record for path in files(directory) for record in records(path) if record.HasField("history")):
        paths = {tuple(item.nested_key) or (item.key,): json.loads(item.value_json) for item in record.history.item}
        found.append({path[0]: value for path, value in paths.items() if path[1:] in ((), ("filenames",))})
    return found


def exit_codes(directory):
    return [record.exit.exit_code for path in files(directory) for record in records(path) if record.HasField("exit")]


def check_against_csv(directory, changing=("images_per_second",)):
    """Every point of metrics.csv is in W&B once, with its value; steps grow; every row says how many images."""
    got = rows(directory)
    steps = [row["_step"] for row in got]
    assert steps == sorted(set(steps))
    assert [row["images_seen"] for row in got] == [4 * row["step"] for row in got]
    points = [((row["step"], name), row[name]) for row in got for name in row if not name.startswith("_")]
    points = [(key, value) for key, value in points if key[1] not in AXES]
    assert max(Counter(key for key, _ in points).values()) == 1
    values = dict(points)
    with (directory / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    wanted = {(int(line["step"]), name): float(value) for line in lines for name, value in line.items() if value}
    wanted = {key: value for key, value in wanted.items() if key[1] not in AXES}
    assert {key for key in values if not key[1].startswith("samples/")} == wanted.keys()
    assert not [key for key, value in wanted.items() if key[1] not in changing and values[key] != value]
    return values


def pictures(values, sampler="onestep"):
    return sorted(step for step, name in values if name == f"samples/{sampler} (ema0.999)")


def test_points_pictures_and_description(job):
    directory = job()
    values = check_against_csv(directory)
    assert values[(12, "fd_classifier_onestep")] == 1 / 12
    assert {"loss", "loss_level_0", "num_levels", "grad_norm", "lr"} <= {name for step, name in values if step == 12}
    assert pictures(values) == pictures(values, "twostep") == [3, 6, 9, 12]
    (path,) = files(directory)
    assert path.parent.name.startswith("offline-run-")
    described = next(record.run for record in records(path) if record.HasField("run"))
    assert (described.run_group, described.job_type, described.display_name) == ("study", "train", "run")
    assert described.project == "consistency"
    assert described.run_id == (directory / "wandb_id.txt").read_text()
    (update,) = [record.config.update for record in records(path) if record.HasField("config")]  # once
    settings = {item.key: json.loads(item.value_json) for item in update}
    assert settings["data"]["batch_size"] == 4
    assert settings["paths"]["output_dir"] == str(directory)  # resolved
    assert exit_codes(directory) == [0]
    metrics = [record.metric for record in records(path) if record.HasField("metric")]
    assert any(metric.glob_name == "*" and metric.step_metric == "images_seen" for metric in metrics)


@pytest.mark.slow
def test_three_jobs_of_one_process_are_three_runs(job):
    described = []
    for seed, name in enumerate("abc"):
        directory = job(name, "trainer.max_steps=4", "study_name=three", f"seed={seed}", "callbacks.sample_grid=null")
        check_against_csv(directory)
        (path,) = files(directory)
        described.append(next(record.run for record in records(path) if record.HasField("run")))
    assert [run.display_name for run in described] == ["a", "b", "c"]
    assert {run.run_group for run in described} == {"three"}
    assert len({run.run_id for run in described}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 0.7, 1], ids=["nothing-on-disk", "torn", "all-on-disk"])
def test_after_a_kill_every_point_comes_once(job, tmp_path, part):
    # A checkpoint at 8; rows at 9 and 10 that come again; pictures at 3 and 6, and at 9 again.
    def kill():
        if part:
            wandb.teardown()
        else:
            kill_wandb()
        raise Killed

    with pytest.raises(Killed):
        job(callbacks=[At(10, kill)])
    directory = tmp_path / "run"
    (path,) = files(directory)
    os.truncate(path, int(part * path.stat().st_size) or path.stat().st_size)
    known = sum(len(segment.rows) for segment in read_segments(directory / "wandb", path.stem.removeprefix("run-")))
    assert known == 7 if part == 1 else known == 0 if part == 0 else 0 < known < 7
    job()
    values = check_against_csv(directory)
    assert pictures(values) == pictures(values, "twostep") == [3, 6, 9, 12]
    assert len({path.stem for path in files(directory)}) == 1  # one id


@pytest.mark.slow
def test_a_failed_run_says_so_and_goes_on(job, tmp_path, monkeypatch):
    # The losses of step 6 are in W&B, its scores are not: they come when it is trained again, in the next free row.
    monkeypatch.setattr(Scores, "fails_at", 6)
    with pytest.raises(RuntimeError, match="no memory"):
        job()
    directory = tmp_path / "run"
    assert exit_codes(directory) == [1]
    monkeypatch.setattr(Scores, "fails_at", None)
    with pytest.raises(SystemExit):
        job(callbacks=[At(10, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    assert exit_codes(directory) == [1, 1]
    job()
    assert exit_codes(directory) == [1, 1, 0]
    check_against_csv(directory)
    assert [(row["step"], row["_step"]) for row in rows(directory) if row["step"] == 6] == [(6, 6), (6, 7)]


@pytest.mark.slow
def test_training_goes_on_when_wandb_dies(job, caplog):
    directory = job(callbacks=[At(6, kill_wandb)])
    assert json.loads((directory / "status.json").read_text())["state"] == "finished"
    assert len((directory / "metrics.csv").read_text().splitlines()) == 1 + 8  # steps 2, 3, 4, 6, 8, 9, 10, 12
    assert len([record for record in caplog.records if "training goes on" in record.message]) == 1
    check_against_csv(job("next", "trainer.max_steps=4"))


# From here on without training: the loggers of a run, and what they are told.


def session(folder, points, *, end="finish", **options):
    """Log (step, metrics) as a run does; then finish, or be killed."""
    loggers = [
        CsvLogger(str(folder)),
        WandbLogger(**{"save_dir": str(folder), "id": "abc", "offline": True, **options}),
    ]
    for step, metrics in points:
        for logger in loggers:
            logger.log_metrics(metrics, step=step)
    _ = loggers[1].experiment
    if end == "kill":
        kill_wandb()
    loggers[1].finish()
    return loggers[1]


def plain(steps):
    return [(step, {"loss": 1 / step, "images_seen": 4 * step}) for step in steps]


def test_a_session_without_a_row_brings_what_the_one_before_lost(tmp_path):
    session(tmp_path, [*plain([2]), (3, {"fd_classifier_onestep": 0.5}), *plain([4])], end="kill")
    assert not rows(tmp_path)
    logger = WandbLogger(str(tmp_path), id="abc", offline=True)
    logger.trainer = SimpleNamespace(lightning_module=SimpleNamespace(progress=SimpleNamespace(step=4, images_seen=16)))
    logger.log_hyperparams({"seed": 1})
    logger.finish()
    check_against_csv(tmp_path)
    session(tmp_path, [])  # brings nothing twice
    check_against_csv(tmp_path)


def test_files_that_end_anywhere_are_read_and_mended(tmp_path):
    session(tmp_path, [(step, {f"metric_{i}": step / (i + 1) for i in range(200)}) for step in range(1, 12)])
    (path,) = files(tmp_path)
    data = path.read_bytes()
    assert len(data) > 2 * 32768
    steps, kept = list(range(1, 12)), []
    for size in [*range(0, 60), *range(60, len(data), 1009), *range(32768 - 8, 32768 + 8), len(data)]:
        path.write_bytes(data[:size])
        (segment,) = read_segments(tmp_path / "wandb", "abc")
        assert list(segment.rows) == steps[: len(segment.rows)]
        segment.mend()
        if segment.has_run:
            mended = [record.WhichOneof("record_type") for record in records(path)]
            assert path.stat().st_size == segment.readable
            assert mended.count("history") == len(segment.rows)
            kept.append(len(segment.rows))
        else:  # `wandb sync` refuses it and all others with it
            assert not path.exists()
            assert path.with_name(f"{path.name}.aside").read_bytes() == data[:size]
    assert sorted(set(kept)) == list(range(12))


def test_a_file_of_another_kind_is_a_warning(tmp_path, caplog):
    folder = tmp_path / "wandb" / "offline-run-20260101_000000-abc"
    folder.mkdir(parents=True)
    (folder / "run-abc.wandb").write_bytes(b":W&B???" + b"\0\0\0\0\5\0\1" + b"\xff" * 5)
    session(tmp_path, plain([2]))
    assert "is of a kind that is not known" in caplog.text


class Run:
    """W&B's run as the logger uses it, online, resumed from a step."""

    offline = disabled = False
    id, dir = "abc", "files"

    def __init__(self, starting_step=0):
        self.starting_step, self.rows, self.exit_code = starting_step, {}, None
        self.config = SimpleNamespace(update=lambda *args, **kwargs: None)

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, data, step):
        assert step >= max(self.rows, default=self.starting_step)
        self.rows.setdefault(step, {}).update(data)

    def finish(self, exit_code):
        self.exit_code = exit_code


def test_online_the_server_says_what_it_has(tmp_path, monkeypatch):
    session(tmp_path, plain([2, 4, 6]))  # offline, and never sent
    run = Run(starting_step=5)  # another session sent 2 and 4
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    session(tmp_path, plain([4, 6, 8]), offline=False)
    assert {step: row["loss"] for step, row in run.rows.items()} == {6: 1 / 6, 8: 1 / 8}
    assert run.exit_code == 0
    # Sent now: `wandb sync` must not send it again.
    assert not files(tmp_path)
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.aside"))) == 1


def test_errors_of_log_calls_are_one_warning(tmp_path, monkeypatch, caplog):
    run = Run()
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    working = run.log
    run.log = lambda *args, **kwargs: 1 / 0
    logger = WandbLogger(str(tmp_path), id="abc")
    csv_logger = CsvLogger(str(tmp_path))
    for step, metrics in plain([2, 4, 6, 8]):
        csv_logger.log_metrics(metrics, step)
        if step == 6:
            run.log = working
        logger.log_metrics(metrics, step)
    assert caplog.text.count("ZeroDivisionError") == 1
    assert list(run.rows) == [6, 8]
    run.finish = lambda exit_code: 1 / 0
    logger.finish()
    # What failed came at the end, after the last row.
    assert [(row["step"], row["loss"]) for row in run.rows.values()] == [(s, 1 / s) for s in (6, 8, 2, 4)]
    assert "wandb sync --include-online" in caplog.text


def refuse(error):
    """`wandb.init` without a server; offline it works."""
    init = wandb.init

    def start(**options):
        if options.get("mode") == "offline":
            return init(**options)
        raise error

    return start


@pytest.mark.parametrize("error", [wandb.errors.CommError("dial tcp: no such host"), TimeoutError("after 60 s")])
def test_without_a_network_the_run_goes_on_offline(tmp_path, monkeypatch, caplog, error):
    monkeypatch.setattr(wandb, "init", refuse(error))
    monkeypatch.chdir(tmp_path)
    session(tmp_path / "run", plain([2, 4]), offline=False)
    check_against_csv(tmp_path / "run")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(error) in warning
    assert warning.endswith("wandb sync run/wandb/offline-run-*-abc*")


@pytest.mark.parametrize(
    "error",
    [
        wandb.errors.UsageError("No API key configured. Use `wandb login` to log in."),
        wandb.errors.AuthenticationError("API key must have 40+ characters, has 5."),
        wandb.errors.CommError("Failed to get resume status: returned error 403: {}"),
    ],
)
def test_a_missing_account_is_one_line_at_the_start(tmp_path, monkeypatch, error):
    monkeypatch.setattr(wandb, "init", refuse(error))
    with pytest.raises(ValueError, match=r"`wandb login`.*logger.wandb.offline=true or WANDB_MODE=offline") as caught:
        WandbLogger(str(tmp_path), id="abc").log_hyperparams({})
    assert "\n" not in str(caught.value)


def test_a_missing_account_stops_a_run_before_it_trains(job, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "init", refuse(wandb.errors.UsageError("No API key configured.")))
    with pytest.raises(ValueError, match="No API key"):
        job("run", "logger.wandb.offline=false")
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_modes_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    session(tmp_path / "disabled", plain([2]))  # although offline=true
    assert not (tmp_path / "disabled" / "wandb").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    session(tmp_path / "offline", plain([2]), offline=False)
    check_against_csv(tmp_path / "offline")


def test_the_agent_of_a_sweep_says_which_run_this_is(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(wandb, "init", lambda **options: given.update(options) or Run())
    monkeypatch.setenv("WANDB_RUN_ID", "agents")
    session(tmp_path, plain([2]), project="mine", entity="me", offline=False)
    assert given["id"] == "agents"
    assert given["project"] == "mine"
    given.clear()
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    session(tmp_path, plain([2]), project="mine", entity="me", offline=False, group="study")
    assert given["group"] == "study"
    assert not {"id", "project", "entity"} & given.keys()


def test_only_the_first_rank_has_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **options: pytest.fail("a run of another rank"))
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = WandbLogger(str(tmp_path), offline=True)
    logger.log_hyperparams({})
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.finish()
    assert not list(tmp_path.iterdir())


def test_a_run_left_open_by_others_is_ended(tmp_path):
    other = wandb.init(mode="offline", dir=tmp_path, project="other")
    session(tmp_path / "run", plain([2, 4]))
    assert wandb.run is None
    assert other.id != "abc"
    check_against_csv(tmp_path / "run")


class TestDescription:
    """What `runs.tracking` fills in."""

    @pytest.fixture
    def described(self, tmp_path, monkeypatch):
        choices = {"method": "ict", "experiment": "smoke_ict", "data": "digits"}
        hydra = SimpleNamespace(
            initialized=lambda: True, get=lambda: OmegaConf.create({"runtime": {"choices": choices}})
        )
        monkeypatch.setattr(tracking, "HydraConfig", hydra)

        def describe(**settings):
            wandb = OmegaConf.create({"id": None, "job_type": None, "tags": None, **settings})
            tracking.describe_wandb_run(wandb, OmegaConf.create({"variant": "l2"}), tmp_path)
            return wandb

        return describe

    def test_type_and_tags_are_choices_of_the_configuration(self, described):
        assert described().job_type == "ict"
        assert described().tags == ["smoke_ict", "digits", "l2"]
        assert described(job_type="x", tags=["y"]).tags == ["y"]
        assert described(job_type="x").job_type == "x"

    def test_the_id_stays_with_the_run(self, described, tmp_path, monkeypatch):
        first = described().id
        assert len(first) == 8
        assert described().id == first == (tmp_path / "wandb_id.txt").read_text()
        monkeypatch.setenv("WANDB_RUN_ID", "agents")
        assert described(id="mine").id == "agents"
        monkeypatch.delenv("WANDB_RUN_ID")
        assert described().id == "agents"

    def test_an_empty_file_is_no_id(self, described, tmp_path):
        (tmp_path / "wandb_id.txt").write_text("")
        assert len(described().id) == 8
