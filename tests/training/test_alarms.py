import json
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from consistency.methods.edm import EDM
from consistency.noise.curricula import FixedDecay
from consistency.noise.levels import LogNormal
from consistency.noise.weightings import uniform
from consistency.training.alarms import Collapse, NonFinite
from consistency.training.averaging import TargetEMA, WeightEMA
from consistency.training.checkpointing import RunCheckpoint
from consistency.training.health import TrainingLog


class Spoil(Callback):
    """Puts `value` into the gradient of these optimizer calls, counted over the sessions of a run."""

    def __init__(self, *calls, value=math.nan, start=0):
        self.calls, self.value, self.seen = calls, value, start

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.seen in self.calls:
            next(pl_module.denoiser.parameters()).grad.view(-1)[0] = self.value
        self.seen += 1


class Watch(Callback):
    """Everything that a step could change, after each micro-batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        average = next(callback for callback in trainer.callbacks if isinstance(callback, WeightEMA))
        copies = {
            "online": pl_module.denoiser.parameters(),
            "target": pl_module.target.parameters(),
            "average": average.averages["ema0.5"].values(),
            "moments": [x for state in trainer.optimizers[0].state.values() for x in state.values()],
        }
        parts = {name: [torch.as_tensor(x).detach().clone() for x in values] for name, values in copies.items()}
        self.seen.append(SimpleNamespace(step=pl_module.progress.step, outputs=outputs, **parts))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def ours(caplog):
    return [record for record in caplog.records if record.name == "consistency.training.alarms"]


@pytest.fixture
def adam():
    return lambda parameters: torch.optim.AdamW(parameters, lr=0.01)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_step_that_is_not_finite_changes_nothing(make_method, train, adam, tmp_path, value):
    watch = Watch()
    callbacks = [Spoil(2, value=value), TargetEMA(), WeightEMA([0.5]), NonFinite(str(tmp_path)), watch]
    method = make_method(optimizer=adam, target_decay=FixedDecay(0.5))
    train(method, steps=4, callbacks=callbacks, gradient_clip_val=1.0)
    assert [seen.step for seen in watch.seen] == [1, 2, 2, 3, 4]
    for part in ("online", "target", "average", "moments"):
        of_steps = [getattr(seen, part) for seen in watch.seen]
        assert same(of_steps[1], of_steps[2]), part
        assert not same(of_steps[2], of_steps[3]), part
        assert all(x.isfinite().all() for x in of_steps[-1])
    assert (callbacks[3].count, callbacks[3].in_a_row) == (1, 0)
    assert method.progress.images_seen == 5 * 4  # those of the skipped step were seen


def test_without_waiting_bad_entries_become_zero_and_the_step_counts(make_method, train, adam, rows, tmp_path, caplog):
    alarm, watch, log, gradients = NonFinite(str(tmp_path), wait=False), Watch(), rows(), []
    method = make_method(optimizer=adam, target_decay=FixedDecay(0.5))

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients.append(next(pl_module.denoiser.parameters()).grad.clone())

    callbacks = [Spoil(1, 2), TrainingLog(2), alarm, Look(), TargetEMA(), WeightEMA([0.5]), watch]
    train(method, steps=4, callbacks=callbacks, loggers=[log])
    assert [seen.step for seen in watch.seen] == [1, 2, 3, 4]
    assert [int(gradient.view(-1)[0] == 0) for gradient in gradients] == [0, 1, 1, 0]
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients)
    assert all(x.isfinite().all() for part in ("online", "moments") for x in getattr(watch.seen[-1], part))
    assert [row["nonfinite_steps"] for _, row in log.rows] == [1, 2]
    assert alarm.state_dict() == {"count": 2, "in_a_row": 0}
    assert [record.args[:3] for record in ours(caplog)] == [(1, 2, 1), (1, 4, 2)]


def test_without_waiting_a_checkpoint_hides_no_warning_and_a_good_step_ends_it(make_method, train, tmp_path, caplog):
    alarm = NonFinite(str(tmp_path), patience=3, wait=False)

    class Save(Callback):
        def on_train_batch_end(self, *_):
            alarm.state_dict()

    # Bad steps 2 to 4, found by the row of step 4; step 5 is good.
    train(make_method(), steps=8, callbacks=[Save(), Spoil(1, 2, 3), TrainingLog(4), alarm])
    assert [record.args[:3] for record in ours(caplog)] == [(3, 4, 3)]
    assert alarm.state_dict() == {"count": 3, "in_a_row": 0}


def test_without_waiting_it_stops_after_the_row_that_finds_too_many(make_method, train, tmp_path):
    method, alarm = make_method(), NonFinite(str(tmp_path), patience=3, wait=False)
    with pytest.raises(FloatingPointError, match=r"nonfinite_rank0\.json"):
        train(method, steps=99, callbacks=[Spoil(*range(99)), TrainingLog(4), alarm])
    assert method.progress.step == 5  # the row of step 4 found them
    repro = json.loads((tmp_path / "nonfinite_rank0.json").read_text())
    assert "nan" in repro["gradient_norms"].values()


def test_one_micro_batch_spoils_its_whole_step(make_method, train, adam, at, tmp_path):
    def spoil(method):
        next(method.denoiser.parameters()).grad.fill_(math.nan)

    alarm, watch = NonFinite(str(tmp_path)), Watch()
    callbacks = [at(2, spoil, end=True), TargetEMA(), WeightEMA([0.5]), alarm, watch]
    train(make_method(optimizer=adam, target_decay=FixedDecay(0.5)), steps=3, accumulate=2, callbacks=callbacks)
    assert [seen.step for seen in watch.seen] == [0, 1, 1, 1, 1, 2, 2, 3]
    assert alarm.count == 1


def test_warnings_at_powers_of_two(make_method, train, tmp_path, caplog):
    alarm = NonFinite(str(tmp_path))
    train(make_method(), steps=6, callbacks=[Spoil(0, 1, 3, 4, 6), alarm])
    assert [record.args[1:] for record in ours(caplog)] == [(1, 1), (2, 2), (4, 2)]
    assert alarm.count == 5


def test_row_shows_what_it_is_and_the_count(make_method, train, rows, at, tmp_path):
    log, clean = rows(), {}

    def spoil(method):
        clean.update({key: value.clone() for key, value in method.denoiser.state_dict().items() if "extra" not in key})
        with torch.no_grad():
            next(method.denoiser.parameters()).fill_(math.nan)

    def mend(method):
        method.denoiser.load_state_dict(clean, strict=False)

    callbacks = [at(2, spoil), TrainingLog(2), NonFinite(str(tmp_path)), at(2, mend, end=True)]
    train(make_method(), steps=6, callbacks=callbacks, loggers=[log])
    assert [step for step, _ in log.rows] == [2, 4, 6]
    assert [row["nonfinite_steps"] for _, row in log.rows] == [0, 1, 1]
    assert [math.isfinite(row["loss"]) for _, row in log.rows] == [True, False, True]
    assert all(math.isfinite(row["grad_norm"]) for _, row in log.rows)


def test_patience(make_method, train, outputs, tmp_path):
    watch, method = outputs(), make_method(num_levels=40)
    alarm = NonFinite(str(tmp_path), patience=3)
    # Two in a row are borne, the third ends the run.
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*step 3;.*nonfinite_rank0\.json"):
        train(method, steps=99, accumulate=2, callbacks=[watch, Spoil(1, 2, 5, 6, 7), alarm])
    repro = json.loads((tmp_path / "nonfinite_rank0.json").read_text())
    assert (repro["step"], repro["seed"], repro["rank"], repro["world_size"]) == (3, 0, 0, 1)
    assert repro["precision"] == "32-true"
    assert len(watch.seen) == 16
    assert len(repro["micro_batches"]) == 2
    for part, seen in zip(repro["micro_batches"], watch.seen[-2:], strict=True):
        assert part["sigma"] == seen.sigma.tolist()
        assert part["loss"] == seen.per_sample.tolist()
    norms = repro["gradient_norms"]
    assert next(iter(norms)) == next(name for name, _ in method.named_parameters())
    assert next(iter(norms.values())) == "nan"
    assert [*norms.values()][1:] == sorted([*norms.values()][1:], reverse=True)


def test_repro_names_the_images(make_method, train, tmp_path):
    shown = []

    class Spy(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            shown.append(batch[0])

        def on_train_end(self, trainer, pl_module):
            raise AssertionError("not reached")

        def on_exception(self, trainer, pl_module, exception):
            self.dataset = trainer.datamodule.dataset

    spy = Spy()
    with pytest.raises(FloatingPointError):
        train(make_method(), steps=99, accumulate=2, callbacks=[spy, Spoil(10), NonFinite(str(tmp_path), patience=1)])
    parts = json.loads((tmp_path / "nonfinite_rank0.json").read_text())["micro_batches"]
    assert [part["position"] for part in parts] == [10 * 4, 10 * 4 + 2]
    for part, images in zip(parts, shown[-2:], strict=True):
        again = torch.stack([spy.dataset[index][0] for index in part["indices"]])
        assert torch.equal(images, again / 127.5 - 1)


def test_count_goes_on_after_a_resume(make_method, make_denoiser, train, at, tmp_path):
    saver, first = RunCheckpoint(str(tmp_path), every_n_steps=2), NonFinite(str(tmp_path))

    def crash(_):
        raise RuntimeError("crash")

    # Optimizer call 1 is skipped and saved with step 2 (call 2); call 3 is skipped after that, and skipped again.
    with pytest.raises(RuntimeError, match="crash"):
        train(make_method(), steps=6, callbacks=[Spoil(1, 3), first, saver, at(4, crash)])
    assert first.count == 2
    again, saver = NonFinite(str(tmp_path)), RunCheckpoint(str(tmp_path), every_n_steps=2)
    train(make_method(), steps=6, callbacks=[Spoil(3, start=3), again, saver], ckpt=saver.path)
    assert again.count == 2


def test_fp16_leaves_the_step_to_the_scaler(tmp_path):
    alarm = NonFinite(str(tmp_path))
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), math.inf)
    trainer = SimpleNamespace(
        precision_plugin=SimpleNamespace(scaler=object()),
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
        is_global_zero=True,
    )
    method = SimpleNamespace(progress=SimpleNamespace(step=0))
    alarm.on_before_optimizer_step(trainer, method, torch.optim.SGD([parameter], lr=1.0))
    assert alarm.count == 1
    assert parameter.grad is not None


def test_refuses_no_patience(tmp_path):
    with pytest.raises(ValueError, match="patience"):
        NonFinite(str(tmp_path), patience=0)


class TestCollapse:
    def test_is_the_variance_over_noise(self, make_denoiser):
        denoiser = make_denoiser(dropout=0.5, num_classes=3).train()
        state = torch.get_rng_state()
        measured = Collapse(64).measure(denoiser)
        assert torch.equal(torch.get_rng_state(), state)
        assert denoiser.training
        x = 80.0 * torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        images = denoiser.eval()(x, torch.full((64,), 80.0), torch.zeros(64, dtype=torch.int64))
        assert measured == pytest.approx(((images - images.mean(0)) ** 2).sum(0).mean().item() / 63, rel=1e-4)

    def test_is_logged_with_the_row_and_does_not_change_training(self, make_method, make_denoiser, train, rows):
        log, denoiser = rows(), make_denoiser(dropout=0.3)
        start = denoiser.state_dict()
        ends = []
        for more in ([], [Collapse()]):
            fresh = make_denoiser(dropout=0.3)
            fresh.load_state_dict(start)
            train(make_method(fresh), steps=4, callbacks=[TrainingLog(2), *more], loggers=[log])
            ends.append(list(fresh.parameters()))
        assert same(*ends)
        assert ["output_variance" in row for _, row in log.rows] == [False, False, True, True]

    def test_only_a_fall_counts_and_only_once(self, make_method, monkeypatch, caplog):
        alarm, method = Collapse(), make_method()
        method.trainer = SimpleNamespace(is_global_zero=True)
        values = [1e-9, 0.5, 1.0, 0.011, 0.009, 0.008, math.nan, 0.5, 0.001]
        monkeypatch.setattr(alarm, "measure", lambda _: values.pop(0))
        falls = []
        for _ in range(len(values)):
            alarm.columns(method)
            falls.append(alarm.falls)
            restored = Collapse()
            restored.load_state_dict(alarm.state_dict())
            assert restored.state_dict() == alarm.state_dict()
        assert falls == [0, 0, 0, 0, 1, 1, 1, 1, 2]
        assert len(ours(caplog)) == 2

    def test_not_for_edm(self, make_denoiser):
        method = EDM(make_denoiser(boundary=0.0), levels=LogNormal(-1.2, 1.2), weighting=uniform, optimizer=None)
        assert Collapse().columns(method) == {}

    def test_refuses_a_batch_without_variance(self):
        with pytest.raises(ValueError, match="num_images"):
            Collapse(1)
