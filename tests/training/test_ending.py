from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision

from consistency.training.averaging import WeightEMA
from consistency.training.checkpointing import RunCheckpoint
from consistency.training.ending import StopAtStep
from consistency.training.evaluation import SampleGrid
from consistency.training.health import TrainingLog


class ScaledOnly(MixedPrecision):
    """The loss scaling of fp16 without its autocast, which the CPU is slow at."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))

    def forward_context(self):
        return nullcontext()


class Overflow(Callback):
    """Gradients overflow in the backward passes with these numbers, so that the scaler skips their steps."""

    def __init__(self, *numbers):
        self.numbers, self.seen = numbers, 0

    def on_after_backward(self, trainer, pl_module):
        if self.seen in self.numbers:
            next(pl_module.denoiser.parameters()).grad.flatten()[0] = torch.inf
        self.seen += 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stops_at_total_steps(make_method, train, outputs, accumulate):
    method, watch = make_method(), outputs()
    train(method, steps=3, accumulate=accumulate, callbacks=[watch])
    assert method.progress.total_steps == method.progress.step == 3
    assert method.progress.is_over
    assert len(watch.seen) == 3 * accumulate


@pytest.mark.parametrize("skipped", [(0,), (1, 2), (3,), (3, 4)], ids=str)
def test_skipped_steps_do_not_count(make_method, train, rows, tmp_path, skipped):
    method, log, average = make_method(), rows(), WeightEMA([0.9])
    grid = SampleGrid(str(tmp_path / "samples"), {"same": lambda denoiser, noise, *_: noise}, num_samples=1)
    saver = RunCheckpoint(str(tmp_path / "checkpoints"))
    ends = [average, TrainingLog(1000), grid, saver]
    trainer = train(method, callbacks=[Overflow(*skipped), *ends], loggers=[log], plugins=[ScaledOnly()])
    assert method.progress.step == 4
    assert trainer.global_step == 4 + len(skipped)  # Lightning counts calls
    # The images of a skipped step were seen.
    images_seen = 4 * (4 + len(skipped))
    assert method.progress.images_seen == images_seen
    assert [(step, row["images_seen"]) for step, row in log.rows] == [(4, images_seen)]
    assert [path.name for path in (tmp_path / "samples").iterdir()] == [f"same_{images_seen:09d}.png"]
    state = torch.load(saver.path, weights_only=True)["state_dict"]
    assert state["progress._extra_state"] == {"step": 4, "images_seen": images_seen}
    assert all(value.isfinite().all() for value in average.averages["ema0.9"].values())


def test_skipped_step_leaves_weights_and_averages(make_method, train):
    class Watch(Callback):
        def __init__(self):
            self.weights, self.averages = [], []

        def on_train_batch_end(self, trainer, pl_module, *_):
            for kept, values in (
                (self.weights, pl_module.denoiser.parameters()),
                (self.averages, average.averages["ema0.9"].values()),
            ):
                kept.append(torch.cat([value.detach().flatten() for value in values]))

    average, watch = WeightEMA([0.9]), Watch()
    train(make_method(), steps=2, callbacks=[Overflow(1), average, watch], plugins=[ScaledOnly()])
    for kept in (watch.weights, watch.averages):
        assert torch.equal(kept[0], kept[1])
        assert not torch.equal(kept[1], kept[2])


def test_resumed_at_its_end_makes_no_step(make_method, train, tmp_path):
    saver, method = RunCheckpoint(str(tmp_path)), make_method()
    train(make_method(), steps=3, callbacks=[saver])
    train(method, steps=3, ckpt=saver.path)
    assert method.progress.step == 3


def test_nobody_says_how_long(make_method, fit):
    method = make_method()
    fit(method, steps=2)
    assert method.progress.total_steps is None
    assert not method.progress.is_over


def test_length_is_told_before_training(make_method):
    method = make_method()
    StopAtStep(7).on_fit_start(None, method)
    assert method.progress.total_steps == 7
