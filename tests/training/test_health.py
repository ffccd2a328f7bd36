import math
import signal

import pytest
import torch

from consistency.noise.curricula import FixedDecay
from consistency.training.averaging import TargetEMA
from consistency.training.checkpointing import RunCheckpoint
from consistency.training.health import LEVEL_EDGES, TrainingLog


def losses(seen):
    """loss and loss_level_* of these micro-batches, the long way."""
    bands = {}
    for output in seen:
        for sigma, loss in zip(output.sigma.tolist(), output.per_sample.tolist(), strict=True):
            bands.setdefault(sum(sigma > edge for edge in LEVEL_EDGES), []).append(loss)
    row = {f"loss_level_{band}": sum(values) / len(values) for band, values in bands.items()}
    every = [value for values in bands.values() for value in values]
    return {"loss": sum(every) / len(every), **row}


def losses_in(row):
    return {key: value for key, value in row.items() if key.startswith("loss")}


def test_row_is_the_mean_over_its_steps(make_method, train, rows, outputs):
    log, watch, method = rows(), outputs(), make_method(num_levels=40)
    training_log = TrainingLog(3)
    train(method, steps=7, accumulate=2, batch_size=16, callbacks=[watch, training_log], loggers=[log])
    assert [step for step, _ in log.rows] == [3, 6, 7]
    for (_, row), first in zip(log.rows, (0, 6, 12), strict=True):
        expected = losses(watch.seen[first : first + 6])
        assert len(expected) > 3
        assert losses_in(row) == pytest.approx(expected, rel=1e-5)
    assert training_log.last_row == log.rows[-1][1]


def test_bands_lie_between_their_edges(make_method, train, rows):
    log = rows()
    # Four levels: 0.002, 0.18, 8.2 (rho = 7) and 80; the online network sees the last three.
    train(make_method(), steps=2, batch_size=32, callbacks=[TrainingLog(2)], loggers=[log])
    ((_, row),) = log.rows
    assert {key for key in row if key.startswith("loss_level")} <= {f"loss_level_{i}" for i in range(6)}
    assert "loss_level_5" in row  # above 12
    assert "loss_level_0" not in row  # below 0.05


def test_other_columns(make_method, train, rows, at):
    norms = []

    def note(method):
        grads = [parameter.grad.flatten() for parameter in method.denoiser.parameters()]
        norms.append(torch.cat(grads).norm().item())

    log, method = rows(), make_method(target_decay=FixedDecay(0.5))
    callbacks = [TargetEMA(), TrainingLog(2), at(1, note, end=True)]
    train(method, steps=2, callbacks=callbacks, loggers=[log])
    ((_, row),) = log.rows
    assert row["num_levels"] == 4
    assert row["target_decay"] == 0.5
    assert row["lr"] == 0.1
    assert row["images_seen"] == 8
    assert row["images_per_second"] > 0
    assert row["grad_norm"] == pytest.approx(norms[0], rel=1e-5)


def test_every_logger_gets_the_row(make_method, train, rows):
    one, other = rows(), rows()
    train(make_method(), steps=2, callbacks=[TrainingLog(1)], loggers=[one, other])
    assert len(one.rows) == 2
    assert one.rows == other.rows


def test_interrupted_row_goes_on(make_method, make_denoiser, train, rows, at, tmp_path):
    denoiser = make_denoiser()
    start = denoiser.state_dict()

    def run(steps, *callbacks, **options):
        fresh, log = make_denoiser(), rows()
        fresh.load_state_dict(start)
        callbacks = [TrainingLog(3), *callbacks]
        train(make_method(fresh, num_levels=40), steps=steps, callbacks=callbacks, loggers=[log], **options)
        return [(step, losses_in(row)) for step, row in log.rows]

    straight = run(6)
    saver = RunCheckpoint(str(tmp_path))
    stop = at(4, lambda _: signal.raise_signal(signal.SIGTERM))
    first = run(6, saver, stop)
    assert [step for step, _ in first] == [3]
    second = run(6, RunCheckpoint(str(tmp_path)), ckpt=saver.path)
    assert first + second == straight


def test_sums_survive_their_state_dict(tmp_path):
    log, again = TrainingLog(), TrainingLog()
    torch.save(log.state_dict(), tmp_path / "empty.pt")
    again.load_state_dict(torch.load(tmp_path / "empty.pt", weights_only=True))
    assert again.state_dict() == {"sums": None, "counts": None}


def test_loss_that_is_not_finite_stops_the_run(make_method, train, rows, at):
    def spoil(method):
        with torch.no_grad():
            next(method.denoiser.parameters()).fill_(torch.nan)

    log = rows()
    with pytest.raises(FloatingPointError, match="the loss is nan at step 4"):
        train(make_method(), steps=9, callbacks=[at(2, spoil), TrainingLog(2)], loggers=[log])
    # The row is there to be looked at.
    assert [step for step, _ in log.rows] == [2, 4]
    assert math.isfinite(log.rows[0][1]["loss"])
    assert math.isnan(log.rows[1][1]["loss"])


def test_refuses_an_interval():
    with pytest.raises(ValueError, match="every_n_steps"):
        TrainingLog(0)
