"""Two processes on the CPU: started by Lightning as on a machine with two devices, by torchrun, and as SLURM does."""

import csv
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from consistency.checkpoints.native import load_model, read_checkpoint
from consistency.commands.folder import RefusedError
from running import run
from test_resume import stopped

pytestmark = pytest.mark.slow
SPY = '''
"""A callback that writes down what its rank saw."""

import signal

import torch
from lightning.pytorch.callbacks import Callback


class Spy(Callback):
    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.images = batch[0].clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # The random state after the step tells whether noise and dropout were the same.
        self.seen.append((self.images, outputs["sigma"].clone(), torch.rand(4)))

    def on_train_end(self, trainer, pl_module):
        ema = next(c for c in trainer.callbacks if type(c).__name__ == "WeightEMA").averages
        state = {
            "seen": self.seen,
            "online": dict(pl_module.denoiser.named_parameters()),
            "target": dict(pl_module.target.named_parameters()),
            "ema": ema["ema0.999"],
            "progress": pl_module.progress.get_extra_state(),
        }
        torch.save(state, f"{self.folder}/rank{trainer.global_rank}.pt")


class Stop(Callback):
    """One process is told to stop."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.progress.step == self.step and trainer.global_rank == trainer.world_size - 1:
            signal.raise_signal(signal.SIGTERM)
'''


TWO = ("strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
SHORT = ("experiment=smoke_ct", "trainer.max_steps=6", "network.dropout=0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "spy.py").write_text(SPY)
    return folder


def command(name, *overrides):
    return ["-m", "consistency.cli", f"run_name={name}", *overrides]


def environment(folder, **variables):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), **variables}


def wait(*children, code=0):
    told = [child.communicate(timeout=600)[0] for child in children]
    assert [child.returncode for child in children] == [code] * len(children), "\n".join(told)
    return "\n".join(told)


def begin(folder, *arguments, **variables):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *arguments], cwd=folder, env=environment(folder, **variables), **pipes)


@pytest.fixture(scope="module")
def two(folder):
    """What two processes saw and ended with, started by Lightning."""
    spy = ("+callbacks.spy._target_=spy.Spy", f"+callbacks.spy.folder={folder}")
    wait(begin(folder, *command("two", *SHORT, *TWO, *spy)))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_ranks_see_other_noise_and_agree_on_the_weights(two, folder):
    a, b = two
    assert a["progress"] == b["progress"]
    assert (a["progress"]["step"], a["progress"]["images_seen"]) == (6, 6 * 16)
    assert len(a["seen"]) == 6
    for step, (mine, other) in enumerate(zip(a["seen"], b["seen"], strict=True)):
        assert len(mine[0]) == 8  # half of the global batch each
        images, sigma, noise = (not torch.equal(x, y) for x, y in zip(mine, other, strict=True))
        assert images
        assert noise
        assert sigma or step == 0  # CT starts with N = 2: one pair for all
    # Six batches of 16 are less than one pass: no image came twice.
    images = torch.cat([seen[0] for rank in (a, b) for seen in rank["seen"]]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)
    for part in ("online", "target", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part]), part

    # The children must not touch the directory of the run that started them.
    names = {path.name for path in (folder / "outputs/two").iterdir()}
    assert "previous" not in names
    assert {"config.yaml", "status.json", "metrics.csv", "model"} <= names


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def test_torchrun_and_slurm_train_the_same(two, folder):
    """Whoever starts the ranks: what they draw is a function of (seed, images seen, number of ranks)."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    wait(begin(folder, *torchrun, *command("torchrun", *SHORT, *TWO)))
    job = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    job |= {"SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [{**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
    wait(*(begin(folder, *command("slurm", *SHORT, *TWO), **rank) for rank in ranks))
    for name in ("torchrun", "slurm"):
        trained, _ = load_model(folder / "outputs" / name, "raw")
        assert all(torch.equal(value, two[0]["online"][key]) for key, value in trained.named_parameters()), name


STEPS = 15
PER_IMAGE = ("experiment=smoke_ct", f"trainer.max_steps={STEPS}", "randomness=per_image", "data.flip=true")
PER_IMAGE += ("callbacks.log.every_n_steps=1",)


def losses(folder, name):
    with (folder / "outputs" / name / "metrics.csv").open() as file:
        return [(float(row["loss"]), float(row["num_levels"])) for row in csv.DictReader(file)]


def assert_alike(folder, name, other):
    (a, levels), (b, other_levels) = (zip(*losses(folder, which), strict=True) for which in (name, other))
    assert len(a) == STEPS
    assert levels == other_levels
    assert a == pytest.approx(b, rel=1e-5)


def test_per_image_one_process_and_two_train_alike(folder):
    run(folder, "one", *PER_IMAGE)
    run(folder, "parts", *PER_IMAGE, "trainer.accumulate_grad_batches=4")
    assert_alike(folder, "parts", "one")
    wait(begin(folder, *command("pair", *PER_IMAGE, *TWO)))
    assert_alike(folder, "pair", "one")


def test_from_one_process_to_two_and_back(folder):
    """Curriculum, target and averages go on; the end is that of the straight run of one process."""
    stop = ("+callbacks.stop._target_=spy.Stop", "allow_changes=[callbacks.stop]")
    ended = 128 + signal.SIGTERM
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, step=5)
        with pytest.raises(SystemExit):
            run(folder, "moved", *PER_IMAGE)
    # The second process is told; both stop after the same step.
    wait(begin(folder, *command("moved", *PER_IMAGE, *TWO, *stop, "+callbacks.stop.step=9")), code=ended)
    half = read_checkpoint(folder / "outputs/moved/checkpoints/last.ckpt")
    assert half["state_dict"]["progress._extra_state"]["step"] == 10
    run(folder, "moved", *PER_IMAGE, "allow_changes=[callbacks.stop]")
    assert_alike(folder, "moved", "one")
    ends = [read_checkpoint(folder / "outputs" / name / "checkpoints/last.ckpt") for name in ("moved", "one")]
    torch.testing.assert_close(*(end["callbacks"]["WeightEMA"] for end in ends), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*(_tensors(end["state_dict"]) for end in ends), rtol=1e-4, atol=1e-5)


def _tensors(state):
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def test_other_number_of_processes_is_refused_where_it_changes_the_draws(two, folder):
    checkpoint = folder / "outputs/two/checkpoints/last.ckpt"
    assert read_checkpoint(checkpoint)["consistency"]["world_size"] == 2
    (folder / "outputs/two/status.json").write_text("{}")  # as if it had been stopped
    spy = ("+callbacks.spy._target_=spy.Spy", f"+callbacks.spy.folder={folder}")
    before = checkpoint.read_bytes()
    sys.path.insert(0, str(folder))
    try:
        with pytest.raises(RefusedError, match=r"2 processes, there are 1 now.*allow_changes=\[trainer.devices\]"):
            run(folder, "two", *SHORT, *spy)
        run(folder, "two", *SHORT, *spy, "allow_changes=[trainer.devices]")
    finally:
        sys.path.remove(str(folder))
    assert checkpoint.read_bytes() == before  # it stood at its end
