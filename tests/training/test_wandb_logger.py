"""W&B: real offline runs, read back from what W&B wrote; resumed, killed, refused, unplugged."""

import csv
import json
import os
from collections import Counter
from contextlib import suppress
from types import SimpleNamespace

import pytest
import wandb
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from composing import composed
from consistency.commands import build, tracking
from consistency.commands import train as runs_train
from consistency.commands.start import start
from consistency.commands.train import train
from consistency.training.wandb_logger import WandbLogger

SMALL = (
    *("experiment=smoke_ict", "logger=wandb", "logger.wandb.offline=true", "trainer.max_steps=12"),
    *("data.batch_size=4", "callbacks.log.every_n_steps=2", "callbacks.checkpoint.every_n_steps=4"),
    *("callbacks.sample_grid.every_n_images=12", "callbacks.sample_grid.num_samples=1", "study_name=study"),
)


class Killed(BaseException):
    """In place of SIGKILL: nothing of ours catches it."""


class At(Callback):
    """Does something after a step that the others have logged."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.progress.step == self.step:
            self.action()


class Scores(Callback):
    """Logs as `QualityCallback` does, every third step, with and without a row of losses."""

    def on_train_start(self, trainer, pl_module):
        trainer.loggers[1].define_scores({"fd_classifier_onestep": "min"})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = pl_module.progress.step
        for logger in trainer.loggers if step % 3 == 0 else ():
            logger.log_metrics({"fd_classifier_onestep": 1 / step, "images_seen": 4 * step}, step=step)


def kill():
    raise Killed


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


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Train in the folder of the test, with further callbacks after the others; returns the run directory."""
    parts = runs_train.build_parts

    def run(*settings, callbacks=()):
        def with_more(group):
            return [*parts(group), *callbacks] if "weight_ema" in group else parts(group)

        directory = tmp_path / "run"
        cfg = composed("train", *SMALL, f"paths.output_dir={directory}", f"paths.cache_dir={tmp_path}/cache", *settings)
        with monkeypatch.context() as patch:
            patch.setattr(runs_train, "build_parts", with_more)
            start(cfg, lambda: train(cfg))
        return directory

    return run


def files(directory):
    return sorted(directory.glob("wandb/*run-*/*.wandb"))


def records(directory):
    """Records of all sessions in order: W&B's files are LevelDB's log format, blocks of 32 KiB, of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # `finish` returns before W&B's process has written everything
    for path in files(directory):
        data, position, parts = path.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if (left := 32768 - position % 32768) < 7:
                position += left
                continue
            size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
            parts, position = parts + data[position + 7 : position + 7 + size], position + 7 + size
            if kind in (1, 4):
                yield wandb_internal_pb2.Record.FromString(parts)
                parts = b""


def rows(directory):
    """Rows of the history, name -> value; of pictures the file names."""
    found = []
    for record in (record for record in records(directory) if record.HasField("history")):
        paths = {tuple(item.nested_key) or (item.key,): json.loads(item.value_json) for item in record.history.item}
        found.append({path[0]: value for path, value in paths.items() if path[1:] in ((), ("filenames",))})
    return found


def points(directory):
    """(step, name) -> value. Each point is there once, rows have growing numbers and say how many images were seen."""
    got = rows(directory)
    assert [row["_step"] for row in got] == sorted({row["_step"] for row in got})
    assert [row["images_seen"] for row in got] == [4 * row["step"] for row in got]
    axes = ("step", "images_seen")
    listed = [((row["step"], name), row[name]) for row in got for name in row if name[0] != "_" and name not in axes]
    assert max(Counter(key for key, _ in listed).values()) == 1
    return dict(listed)


def test_a_run_read_back(job, monkeypatch):
    typed = {"metric": "l2", "optimizer.lr": "1e-4"}
    monkeypatch.setattr(build, "typed_overrides", lambda: typed)
    directory = job(callbacks=[Scores()])
    got = points(directory)
    with (directory / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    wanted = {(int(line["step"]), name): float(value) for line in lines for name, value in line.items() if value}
    wanted = {key: value for key, value in wanted.items() if key[1] not in ("step", "images_seen")}
    pictures = {key for key in got if key[1].startswith("samples/")}
    assert {key: value for key, value in got.items() if key not in pictures} == wanted
    assert pictures == {(step, f"samples/{name}") for step in (3, 6, 9, 12) for name in ("onestep", "twostep")}
    described = next(record.run for record in records(directory) if record.HasField("run"))
    assert (described.project, described.run_group, described.job_type) == ("consistency", "study", "train")
    assert described.run_id == (directory / "wandb_id.txt").read_text()
    (update,) = [record.config.update for record in records(directory) if record.HasField("config")]
    settings = {item.key: json.loads(item.value_json) for item in update}
    assert settings["overrides"] == typed
    assert settings["paths"]["output_dir"] == str(directory)  # resolved
    metrics = [record.metric for record in records(directory) if record.HasField("metric")]
    assert any(metric.glob_name == "*" and metric.step_metric == "images_seen" for metric in metrics)
    (score,) = [metric for metric in metrics if metric.name == "fd_classifier_onestep"]
    assert score.summary.min
    assert [record.exit.exit_code for record in records(directory) if record.HasField("exit")] == [0]


@pytest.mark.slow
def test_after_a_crash_nothing_is_sent_twice(job, tmp_path):
    # The checkpoint is at 8; rows at 10 and pictures at 9 are trained again.
    with pytest.raises(Killed):
        job(callbacks=[At(10, kill)])
    directory = job()
    got = points(directory)
    assert sorted(step for step, name in got if name == "loss") == [2, 4, 6, 8, 10, 12]
    assert sorted(step for step, name in got if name == "samples/onestep") == [3, 6, 9, 12]
    assert len(files(directory)) == 2
    assert len({path.stem for path in files(directory)}) == 1  # one id
    assert [record.exit.exit_code for record in records(directory) if record.HasField("exit")] == [1, 0]


# From here on without training: the logger alone.


def session(folder, steps, **options):
    logger = WandbLogger(str(folder), **{"id": "abc", "offline": True, **options})
    for step in steps:
        logger.log_metrics({"loss": 1 / step, "images_seen": 4 * step}, step=step)
    logger.finish()


def test_a_resumed_session_appends(tmp_path):
    session(tmp_path, [2, 4, 6])
    session(tmp_path, [4, 6, 8])
    assert points(tmp_path) == {(step, "loss"): 1 / step for step in (2, 4, 6, 8)}
    # A score that was given up at the last checkpoint and made up for; a row that does not say how many images.
    logger = WandbLogger(str(tmp_path), id="abc", offline=True)
    logger.log_metrics({"loss": 5.0, "fid": 3.0}, step=8)
    logger.finish()
    assert points(tmp_path)[8, "fid"] == 3
    assert points(tmp_path)[8, "loss"] == 1 / 8


class Run:
    """Stands in for the server: W&B's run as the logger uses it, online, resumed from a step."""

    offline = disabled = False

    def __init__(self, starting_step=0):
        self.starting_step, self.rows, self.exit_code = starting_step, {}, None

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, data, step, commit):
        assert commit
        assert step >= max(self.rows, default=self.starting_step)  # W&B ignores other rows
        self.rows[step] = data

    def finish(self, exit_code):
        self.exit_code = exit_code


def test_online_rows_come_after_those_of_the_server(tmp_path, monkeypatch):
    run = Run(starting_step=7)
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    session(tmp_path, [4, 6, 8], offline=False)
    assert {number: row["step"] for number, row in run.rows.items()} == {7: 4, 8: 6, 9: 8}
    assert run.exit_code == 0


def test_errors_of_wandb_are_one_warning(tmp_path, monkeypatch, caplog):
    run = Run()
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    run.log = lambda *args, **kwargs: 1 / 0
    run.finish = lambda exit_code: 1 / 0
    session(tmp_path, [2, 4])
    assert caplog.text.count("training continues") == 1
    assert "wandb sync" in caplog.text


def refuse(error):
    """`wandb.init` without a server; offline it works."""
    init = wandb.init

    def begin(**options):
        if options.get("mode") == "offline":
            return init(**options)
        raise error

    return begin


@pytest.mark.parametrize("error", [wandb.errors.CommError("dial tcp: no such host"), TimeoutError("after 60 s")])
def test_without_a_network_the_run_goes_on_offline(tmp_path, monkeypatch, caplog, error):
    monkeypatch.setattr(wandb, "init", refuse(error))
    session(tmp_path, [2, 4], offline=False)
    assert len(points(tmp_path)) == 2
    assert str(error) in caplog.text
    assert "wandb sync" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        wandb.errors.UsageError("No API key configured. Use `wandb login` to log in."),
        wandb.errors.AuthenticationError("API key must have 40+ characters, has 5."),
        wandb.errors.CommError("Failed to get resume status: returned error 403: {}"),
    ],
)
def test_a_missing_account_is_one_line_before_training(job, tmp_path, monkeypatch, error):
    monkeypatch.setattr(wandb, "init", refuse(error))
    with pytest.raises(Exception, match=r"`wandb login`.*logger.wandb.offline=true or WANDB_MODE=offline"):
        job("logger.wandb.offline=false")
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_modes_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    session(tmp_path / "disabled", [2])  # although offline=true
    assert not (tmp_path / "disabled" / "wandb").exists()
    wandb.teardown()  # W&B reads the environment once a process
    monkeypatch.setenv("WANDB_MODE", "offline")
    session(tmp_path / "offline", [2], offline=False)
    assert len(points(tmp_path / "offline")) == 1


def test_only_the_first_rank_has_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **options: pytest.fail("a run of another rank"))
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    session(tmp_path, [2])
    assert not list(tmp_path.iterdir())


def test_a_run_left_open_by_others_is_ended(tmp_path):
    other = wandb.init(mode="offline", dir=tmp_path, project="other")
    session(tmp_path / "run", [2, 4])
    assert other.id != "abc"
    assert len(points(tmp_path / "run")) == 2


class TestDescription:
    """What `commands.tracking` fills in."""

    @pytest.fixture
    def described(self, tmp_path, monkeypatch):
        choices = {"method": "ict", "experiment": "smoke_ict", "data": "digits"}
        typed = ["metric=l2", "+model.x=a=b", "~callbacks.quality"]
        hydra = OmegaConf.create({"runtime": {"choices": choices}, "overrides": {"task": typed}})
        monkeypatch.setattr(tracking, "HydraConfig", SimpleNamespace(initialized=lambda: True, get=lambda: hydra))

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
        assert tracking.typed_overrides() == {"metric": "l2", "model.x": "a=b", "callbacks.quality": ""}

    def test_the_id_stays_with_the_run(self, described, tmp_path, monkeypatch):
        first = described().id
        assert len(first) == 8
        assert described().id == first == (tmp_path / "wandb_id.txt").read_text()
        monkeypatch.setenv("WANDB_RUN_ID", "agents")
        assert described(id="mine").id == "agents"
        monkeypatch.delenv("WANDB_RUN_ID")
        assert described().id == "agents"
