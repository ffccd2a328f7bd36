"""Stopped and continued runs against straight ones, and what is refused; in this process, on the smoke recipes."""

import csv
import json
import os
import signal

import pytest
import torch

from composing import composed
from consistency.checkpoints.native import read_checkpoint
from consistency.commands.folder import RefusedError
from consistency.commands.start import start
from consistency.data.module import ImageDataModule
from consistency.training.required import StepSeeds
from running import run

# Six steps of 32 over 100 images: the data begins its second pass in step 4.
COMMON = ("+data.dataset.limit=100", "data.batch_size=32", "trainer.max_steps=6", "callbacks.log.every_n_steps=1")
COMMON += ("network.dropout=0.2", "callbacks.weight_ema.decays=[0.9]", "callbacks.weight_ema.half_lives=[300]")


@pytest.fixture(scope="module")
def teacher(trained):
    return trained / "outputs/smoke_edm"


def overrides_of(method, teacher):
    start = {"cd": [f"teacher={teacher}"], "ect": [f"init_from={teacher}"]}.get(method, [])
    # A schedule of the rate, and a target that moves, where the method has one.
    schedule = {
        "edm": [
            "+method.lr_schedule={_target_: consistency.methods.progress.linear_warmup, _partial_: true, "
            "images: 500, batch_size: 32}"
        ]
    }.get(method, [])
    network = [key for key in COMMON if not (method == "cd" and key.startswith("network."))]
    dropout = ["method.dropout=0.2"] if method == "cd" else []
    return [f"experiment=smoke_{method}", *network, *dropout, *start, *schedule]


def stopped(monkeypatch, step, number=signal.SIGTERM):
    """The signal comes in a training step."""
    begin = StepSeeds.on_train_batch_start

    def stop(self, trainer, pl_module, batch, batch_idx):
        begin(self, trainer, pl_module, batch, batch_idx)
        if pl_module.progress.step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(StepSeeds, "on_train_batch_start", stop)


def last(folder, name):
    return read_checkpoint(folder / "outputs" / name / "checkpoints/last.ckpt")


def assert_equal(a, b, path=""):
    """Of nested containers, bit for bit; but for times."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in ("seconds", "config"):
                assert_equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("edm", "cd", "ict", "ect")]


@pytest.mark.parametrize("method", ["ct", *SLOW])
def test_stopped_and_continued_is_the_straight_run(tmp_path, monkeypatch, teacher, method):
    """In the middle of a pass over the data, with accumulation, a loader process, dropout, two averages."""
    more = ("trainer.accumulate_grad_batches=2", "data.num_workers=1")
    overrides = [*overrides_of(method, teacher), *more]
    run(tmp_path, "straight", *overrides)
    with monkeypatch.context() as patch:
        stopped(patch, step=3)
        with pytest.raises(SystemExit) as exit:
            run(tmp_path, "broken", *overrides)
    assert exit.value.code == 128 + signal.SIGTERM
    status = json.loads((tmp_path / "outputs/broken/status.json").read_text())
    assert (status["state"], status["step"]) == ("interrupted", 4)  # the step in which it came was finished
    run(tmp_path, "broken", *overrides)
    assert_equal(last(tmp_path, "broken"), last(tmp_path, "straight"))
    a, b = ((tmp_path / "outputs" / name / "metrics.csv").read_text().splitlines() for name in ("broken", "straight"))
    speed = a[0].split(",").index("images_per_second")
    a, b = ([[x for i, x in enumerate(row.split(",")) if i != speed] for row in rows] for rows in (a, b))
    assert a == b
    assert len(a) == 7


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """A run that was stopped after step 4, with checkpoints of steps 3 and 4."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, step=3)
        with pytest.raises(SystemExit):
            run(folder, "run", *overrides_of("ct", None), "callbacks.checkpoint.every_n_steps=1")
    return folder


@pytest.fixture
def broken(half_way, tmp_path):
    """A copy of it, and a function that changes the contents of its checkpoint."""
    import shutil

    shutil.copytree(half_way / "outputs", tmp_path / "outputs")
    path = tmp_path / "outputs/run/checkpoints/last.ckpt"

    def change(action):
        contents = torch.load(path, weights_only=True)
        action(contents)
        torch.save(contents, path)

    return tmp_path, path, change


def go_on(folder, *more):
    run(folder, "run", *overrides_of("ct", None), *more)
    return last(folder, "run")["state_dict"]["progress._extra_state"]


def test_two_are_kept(broken):
    _, path, _ = broken
    assert {file.name for file in path.parent.iterdir()} == {"last.ckpt", "previous.ckpt"}
    steps = [read_checkpoint(path.with_name(f"{name}.ckpt")) for name in ("previous", "last")]
    assert [step["state_dict"]["progress._extra_state"]["step"] for step in steps] == [3, 4]


@pytest.mark.parametrize("damage", ["flip", *(pytest.param(x, marks=pytest.mark.slow) for x in ("cut", "empty"))])
def test_damaged_file_falls_back_to_the_one_before(broken, caplog, damage):
    folder, path, _ = broken
    data = bytearray(path.read_bytes())
    if damage == "flip":  # in the middle of a tensor: torch would read it without a word
        data[len(data) // 2] ^= 1
    path.write_bytes({"flip": data, "cut": data[:-100], "empty": b""}[damage])
    whole = path.with_name("previous.ckpt").read_bytes()
    assert go_on(folder, "callbacks.checkpoint.every_n_steps=1")["step"] == 6
    assert "going on from the one before it, at step 3" in caplog.text
    assert path.with_name("damaged.ckpt").read_bytes() == {"flip": data, "cut": data[:-100], "empty": b""}[damage]
    assert whole != path.with_name("previous.ckpt").read_bytes()


def test_killed_between_the_two_renames(broken, caplog):
    folder, path, _ = broken
    path.unlink()
    assert go_on(folder)["step"] == 6


def test_nothing_whole_is_an_error(broken):
    folder, path, _ = broken
    for name in ("last", "previous"):
        path.with_name(f"{name}.ckpt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"last\.ckpt is not a readable.*nor can the one before it.*overwrite=true"):
        go_on(folder)
    assert path.read_bytes() == b"PK"


def drop(*keys):
    def action(contents):
        for key in keys[:-1]:
            contents = contents[key]
        del contents[keys[-1]]

    return action


def drop_network(name):
    def action(contents):
        for key in [key for key in contents["state_dict"] if key.startswith(f"{name}.")]:
            del contents["state_dict"][key]

    return action


@pytest.mark.parametrize(
    ("action", "name"),
    [
        (drop_network("target"), "'target' .0 of"),
        (lambda contents: contents["optimizer_states"][0]["state"].popitem(), r"'optimizer_states\[0\]'"),
        (drop("callbacks", "WeightEMA"), r"'callbacks\.WeightEMA'"),
        *(
            pytest.param(action, name, marks=pytest.mark.slow)
            for action, name in (
                (drop_network("denoiser"), "'denoiser'"),
                (drop("state_dict", "target.network.stem.weight"), "'target'"),
                (drop("state_dict", "progress._extra_state"), "'progress'"),
                (drop("optimizer_states"), r"'optimizer_states\[0\]'"),
                (drop("callbacks", "TrainingLog"), r"'callbacks\.TrainingLog'"),
                (drop("loops"), "'loops'"),
            )
        ),
    ],
)
def test_missing_part_is_named(broken, action, name):
    folder, path, change = broken
    change(action)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"lacks the part {name}"):
        go_on(folder)
    assert path.read_bytes() == before


def test_settings_that_change_the_run_need_to_be_allowed(broken, caplog):
    folder, _, _ = broken
    with pytest.raises(RefusedError, match=r"optimizer\.lr: .* -> 1e-05.*allow_changes="):
        go_on(folder, "optimizer.lr=1e-5")
    with pytest.raises(RefusedError, match=r"other settings \(seed: 0 -> 1\)"):
        go_on(folder, "optimizer.lr=1e-5", "seed=1", "allow_changes=[optimizer]")
    with pytest.raises(RefusedError, match=r"allow_changes lists optimizer\.lrr, which is no setting"):
        go_on(folder, "optimizer.lr=1e-5", "allow_changes=[optimizer.lr,optimizer.lrr]")
    assert go_on(folder, "optimizer.lr=1e-5", "allow_changes=[optimizer.lr]")["step"] == 6
    assert "goes on with other settings: optimizer.lr" in caplog.text
    with (folder / "outputs/run/metrics.csv").open() as file:  # the optimizer's state has a rate of its own
        assert [float(row["lr"]) for row in csv.DictReader(file)] == [1e-3] * 4 + [1e-5] * 2


def test_checkpoint_says_its_settings_and_not_the_file_beside_it(broken):
    """config.yaml may be gone, or of a command that failed; a checkpoint may be of another run."""
    folder, path, change = broken
    (path.parents[1] / "config.yaml").unlink()
    with pytest.raises(RefusedError, match=r"other settings \(seed: 0 -> 1\)"):
        go_on(folder, "seed=1")
    with pytest.raises(RefusedError, match=r"network\.channels: 8 -> 16"):
        go_on(folder, "network.channels=16")
    change(lambda contents: contents["consistency"].update(config="a: 1"))
    with pytest.raises(RefusedError, match="other settings"):
        go_on(folder)
    change(lambda contents: contents["consistency"].pop("config"))
    with pytest.raises(ValueError, match="does not say under which settings"):
        go_on(folder)


def test_limit_of_time_loses_nothing(tmp_path, monkeypatch):
    begin = StepSeeds.on_train_batch_start

    def late(self, trainer, pl_module, batch, batch_idx):
        begin(self, trainer, pl_module, batch, batch_idx)
        trainer.should_stop = pl_module.progress.step == 2

    monkeypatch.setattr(StepSeeds, "on_train_batch_start", late)
    with pytest.raises(SystemExit) as exit:
        run(tmp_path, "run", *overrides_of("ct", None))
    assert exit.value.code == 1
    assert last(tmp_path, "run")["state_dict"]["progress._extra_state"]["step"] == 3


def test_signal_before_training_is_no_success(tmp_path, monkeypatch):
    """Lightning listens earlier than the checkpoint callback, and leaves with code 0."""
    make = ImageDataModule.train_dataloader

    def slow(self):
        signal.raise_signal(signal.SIGTERM)
        return make(self)

    monkeypatch.setattr(ImageDataModule, "train_dataloader", slow)
    with pytest.raises(SystemExit) as exit:
        run(tmp_path, "run", *overrides_of("ct", None))
    assert exit.value.code == 128 + signal.SIGTERM
    assert json.loads((tmp_path / "outputs/run/status.json").read_text())["state"] == "interrupted"


def test_wrong_option_does_not_set_a_run_aside(broken):
    folder, path, _ = broken
    with pytest.raises(ValueError, match=r"optimizer\.lr"):
        start(composed("train", f"paths.output_dir={folder}/outputs/run", "overwrite=true", "optimizer.lr=-1"), None)
    assert path.exists()


def test_another_batch_keeps_schedules_where_they_are_in_images(broken):
    folder, _, _ = broken
    # 4 steps of 32 are 2 of 64: three in all leave one.
    changes = ("data.batch_size=64", "trainer.max_steps=3", "allow_changes=[data.batch_size,trainer.max_steps]")
    after = go_on(folder, *changes)
    expected = {"step": 5, "images_seen": 192, "schedule_step": 3, "batch_size": 64, "first_batch_size": 32}
    assert after == expected


def test_other_accumulation_goes_on_with_whole_steps(broken):
    folder, _, _ = broken
    after = go_on(folder, "trainer.accumulate_grad_batches=2", "allow_changes=[trainer.accumulate_grad_batches]")
    assert (after["step"], after["images_seen"]) == (6, 192)


def test_slurm_job_that_is_warned_is_queued_again(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin/scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/told\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    stopped(monkeypatch, step=1, number=signal.SIGUSR1)
    with pytest.raises(SystemExit) as exit:
        run(tmp_path, "run", *overrides_of("ct", None))
    assert exit.value.code == 128 + signal.SIGUSR1
    assert (tmp_path / "told").read_text() == "requeue 7_3\n"
    assert last(tmp_path, "run")["state_dict"]["progress._extra_state"]["step"] == 2


def test_another_batch_keeps_the_learning_rate_where_it_is_in_images(tmp_path, monkeypatch):
    """The warm-up of 640 images: a fifth of it after 4 steps of 32, three tenths after one step of 64 more."""
    warm_up = (
        "+method.lr_schedule={_target_: consistency.methods.progress.linear_warmup, _partial_: true, images: 640, "
    )
    common = ["experiment=smoke_edm", *COMMON, warm_up + "batch_size: '${data.batch_size}'}"]
    with monkeypatch.context() as patch:
        stopped(patch, step=3)
        with pytest.raises(SystemExit):
            run(tmp_path, "run", *common)
    run(
        tmp_path, "run", *common, "data.batch_size=64", "trainer.max_steps=4", "allow_changes=[data.batch_size,trainer]"
    )
    with (tmp_path / "outputs/run/metrics.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([5e-5, 1e-4, 1.5e-4, 2e-4, 3e-4, 4e-4])
