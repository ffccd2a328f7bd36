"""Between two rows of the log nothing reads a number from the device, which would stop the loop until it is there."""

import traceback
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode

import consistency
from composing import composed
from consistency.commands.build import build_data, build_method, build_parts, build_trainer, fit_quietly
from consistency.training.required import StepSeeds, StopAtStep

OURS = str(Path(consistency.__file__).parent)
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")
ON_CPU_ONLY = ("unet.py:_embed",)  # F.one_hot looks at its labels on a CPU, not on CUDA


def ours():
    """Who of ours is at work, "file:function"; None where it is not for us to say."""
    frames = [(frame.filename, frame.name) for frame in traceback.extract_stack()]
    who = max((number for number, (file, _) in enumerate(frames) if file.startswith(OURS)), default=-1)
    # Optimizers count their steps on the CPU; what they call back (the whole step is their closure) is ours.
    of_optimizer = any("torch/optim" in file for file, _ in frames[who + 1 :])
    place = f"{Path(frames[who][0]).name}:{frames[who][1]}"
    allowed = who < 0 or of_optimizer or "/noise/" in frames[who][0] or place in ON_CPU_ONLY
    return None if allowed else place


class Reads(TorchDispatchMode):
    """Notes who of ours turns a tensor into numbers; levels and grids are made on the CPU and may."""

    def __init__(self, places):
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in READS and (place := ours()):
            self.places.append(place)
        return func(*args, **(kwargs or {}))


class HotLoop(Callback):
    """From the start of a step's batch to its end, except where a row is due."""

    def __init__(self, enter, leave):
        self.enter, self.leave, self.inside = enter, leave, False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.progress.step in (0, 1, 3, 4):  # rows are written after steps 3, 6 and 7, the last
            self.enter()
            self.inside = True

    def on_train_batch_end(self, *_):
        if self.inside:
            self.leave()
            self.inside = False


def train(folder, enter, leave, *overrides):
    settings = ["trainer.max_steps=7", "logger=none", "callbacks.sample_grid=null", "callbacks.checkpoint=null"]
    settings += ["callbacks.progress=null", "callbacks.log.every_n_steps=3", "callbacks.collapse=null"]
    cfg = composed("train", *settings, f"paths.output_dir={folder}", *overrides)
    data = build_data(cfg)
    method = build_method(cfg, data)
    hot = HotLoop(enter, leave)
    trainer = build_trainer(cfg, [StepSeeds(0), StopAtStep(7), *build_parts(cfg.callbacks), hot], [], None)
    fit_quietly(trainer, method, data, None)
    assert method.progress.step == 7


def places_of(folder, *overrides):
    places, modes = [], []

    def enter():
        patch = pytest.MonkeyPatch()
        for name in ("tolist", "cpu", "numpy"):  # on a CPU they call no operator
            patch.setattr(torch.Tensor, name, noted(getattr(torch.Tensor, name), places))
        modes.append((Reads(places), patch))
        modes[-1][0].__enter__()

    def leave():
        mode, patch = modes.pop()
        mode.__exit__(None, None, None)
        patch.undo()

    train(folder, enter, leave, *overrides)
    return places


def noted(method, places):
    def call(self, *args, **kwargs):
        if place := ours():
            places.append(place)
        return method(self, *args, **kwargs)

    return call


RECIPES = {
    "ict": ("experiment=smoke_ict",),
    "ct": ("experiment=smoke_ct",),
    "ect": ("experiment=smoke_ect", "init_from=null"),
    "edm": ("experiment=smoke_edm", "data.flip=true", "network.num_classes=10", "model.label_dropout=0.2"),
}


@pytest.mark.parametrize("recipe", ["ct", "edm", *(pytest.param(r, marks=pytest.mark.slow) for r in ("ict", "ect"))])
def test_nothing_is_read_between_rows(tmp_path, recipe):
    assert places_of(tmp_path, *RECIPES[recipe], "callbacks.nonfinite.wait=false", "data.on_device=true") == []


def test_skipping_a_step_reads_one_number_and_no_other(tmp_path):
    places = places_of(tmp_path, "experiment=smoke_ict")
    assert set(places) == {"alarms.py:on_before_optimizer_step"}
    assert len(places) == 4  # steps 1, 2, 4, 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", RECIPES)
def test_cuda_never_waits(tmp_path, recipe):
    train(
        tmp_path,
        lambda: torch.cuda.set_sync_debug_mode("error"),
        lambda: torch.cuda.set_sync_debug_mode("default"),
        *RECIPES[recipe],
        "callbacks.nonfinite.wait=false",
        "data.on_device=true",
        "trainer.accelerator=gpu",
    )
