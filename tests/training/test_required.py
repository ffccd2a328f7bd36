from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision

from consistency.methods.progress import Progress
from consistency.noise.curricula import FixedDecay
from consistency.training.averaging import TargetEMA, WeightEMA
from consistency.training.checkpointing import RunCheckpoint
from consistency.training.evaluation import SampleGrid
from consistency.training.health import TrainingLog
from consistency.training.required import RankConsistencyCheck, StepSeeds, StopAtStep, check_ranks_agree


@pytest.fixture
def draw():
    def numbers(*, seed=0, rank=0, images_seen=0, pending=0):
        progress = Progress()
        progress.images_seen, progress.pending = images_seen, pending
        trainer = SimpleNamespace(global_rank=rank)
        method = SimpleNamespace(device=torch.device("cpu"), progress=progress)
        StepSeeds(seed).on_train_batch_start(trainer, method, None, 0)
        return tuple(torch.randn(8).tolist())

    return numbers


def test_equal_when_repeated(draw):
    first = draw(seed=1, rank=2, images_seen=3)
    torch.rand(100)
    torch.manual_seed(5)
    assert draw(seed=1, rank=2, images_seen=3) == first


def test_differs_by_seed_rank_and_position(draw):
    places = list(product(range(3), range(3), (0, 4, 8)))
    assert len({draw(seed=seed, rank=rank, images_seen=images) for seed, rank, images in places}) == 27


def test_micro_batches_of_a_step_differ(draw):
    assert draw(images_seen=8) != draw(images_seen=8, pending=4)
    # Position is what counts, however the steps are cut.
    assert draw(images_seen=8, pending=4) == draw(images_seen=12)


def test_same_run_twice(make_method, train, outputs):
    seen = []
    for _ in range(2):
        watch = outputs()
        train(make_method(num_levels=1000), steps=3, accumulate=2, batch_size=8, callbacks=[watch])
        seen.append(torch.stack([output.sigma for output in watch.seen]))
        torch.rand(7)
    assert torch.equal(*seen)
    assert len(seen[0].unique(dim=0)) == 6


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


def trainer_of(*rows):
    """All ranks' numbers, as the first would gather them."""
    gathered = torch.tensor(rows, dtype=torch.float64)
    strategy = SimpleNamespace(all_gather=lambda mine: gathered, root_device=torch.device("cpu"))
    return SimpleNamespace(world_size=len(rows), strategy=strategy)


def test_names_what_differs_and_where():
    nan = float("nan")
    check_ranks_agree(trainer_of([1.0, nan], [1.0, nan]), {"a": 1.0, "b": nan})
    check_ranks_agree(trainer_of([1.0], [1.0 + 1e-4]), {"a": 1.0}, tolerance=1e-3)
    with pytest.raises(RuntimeError, match="process 1 has another a"):
        check_ranks_agree(trainer_of([1.0], [1.0 + 1e-7]), {"a": 1.0})  # networks must be equal, not close
    with pytest.raises(RuntimeError, match=r"process 2 has another b \(2\.1\) than process 0 \(2\)"):
        check_ranks_agree(trainer_of([1.0, 2.0], [1.0, 2.0], [1.0, 2.1]), {"a": 1.0, "b": 2.0})


def test_one_process_gathers_nothing():
    check_ranks_agree(SimpleNamespace(world_size=1), {"a": 1.0})


@pytest.mark.parametrize("part", ["online network", "target network", "average ema0.9"])
def test_every_network_is_looked_at(make_method, train, monkeypatch, part):
    seen = []
    monkeypatch.setattr("consistency.training.required.check_ranks_agree", lambda _, numbers: seen.append(numbers))
    monkeypatch.setattr("lightning.Trainer.world_size", 2)
    method = make_method(target_decay=FixedDecay(0.5))
    train(
        method, steps=8, callbacks=[TargetEMA(), WeightEMA([0.9]), RankConsistencyCheck(every_n_steps=3)], batch_size=8
    )
    assert seen[0] == {"progress.step": 0, "progress.schedule_step": 0, "progress.images_seen": 0}
    assert len(seen) == 7  # at the start, and after steps 1, 2, 3, 4, 6, 8
    assert len({numbers[part] for numbers in seen[1:]}) == 6  # it moves
