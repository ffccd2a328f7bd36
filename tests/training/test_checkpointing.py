import io
import resource
import signal
import threading

import pytest
import torch

from consistency.training.checkpointing import RunCheckpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def stored(saver):
    """The checkpoint, opened without executing anything."""
    return torch.load(saver.path, weights_only=True)


def progress_of(saver):
    return stored(saver)["state_dict"]["progress._extra_state"]


class Watched(RunCheckpoint):
    """Notes the step and the pending images of each save."""

    def __init__(self, dirpath, every_n_steps=1000):
        super().__init__(dirpath, every_n_steps)
        self.saves = []

    def save(self, trainer):
        progress = trainer.lightning_module.progress
        self.saves.append((progress.step, progress.pending))
        super().save(trainer)


@pytest.fixture
def saver(tmp_path):
    return Watched(str(tmp_path / "checkpoints"), every_n_steps=2)


def test_saves_every_n_steps_and_at_the_end(make_method, train, saver):
    method = make_method()
    train(method, steps=5, callbacks=[saver])
    assert saver.saves == [(2, 0), (4, 0), (5, 0)]
    assert progress_of(saver) == {"step": 5, "images_seen": 20}
    weights = dict(method.denoiser.named_parameters())
    state = stored(saver)["state_dict"]
    assert all(torch.equal(state[f"denoiser.{key}"], value) for key, value in weights.items())
    assert {path.name for path in saver.path.parent.iterdir()} == {"last.ckpt", "previous.ckpt"}
    previous = torch.load(saver.path.with_name("previous.ckpt"), weights_only=True)
    assert previous["state_dict"]["progress._extra_state"]["step"] == 4
    assert saver.interrupted_by is None


def test_end_on_a_multiple_is_saved_once(make_method, train, saver):
    train(make_method(), steps=4, callbacks=[saver])
    assert saver.saves == [(2, 0), (4, 0)]


def test_only_between_optimizer_steps(make_method, train, saver):
    train(make_method(), steps=5, accumulate=3, batch_size=6, callbacks=[saver])
    assert saver.saves == [(2, 0), (4, 0), (5, 0)]
    assert progress_of(saver) == {"step": 5, "images_seen": 30}


def test_metadata_and_seconds(make_method, train, tmp_path):
    first, second = (RunCheckpoint(str(tmp_path)) for _ in range(2))
    first.metadata = {"config": "seed: 0", "method": "ConsistencyTraining"}
    train(make_method(), steps=2, callbacks=[first])
    assert first.metadata.items() <= stored(first)["consistency"].items()
    earlier = stored(first)["callbacks"]["RunCheckpoint"]["seconds"]
    assert earlier > 0
    # A later session adds to it.
    train(make_method(), steps=3, callbacks=[second], ckpt=first.path)
    assert progress_of(second)["step"] == 3
    assert stored(second)["callbacks"]["RunCheckpoint"]["seconds"] > earlier
    second.load_state_dict({"seconds": 1000.0})
    assert second.seconds > 1000


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_stops_after_the_step(make_method, train, saver, at, number):
    before = handlers()
    method = make_method()
    trainer = train(method, steps=9, callbacks=[at(2, lambda _: signal.raise_signal(number)), saver])
    assert saver.saves == [(2, 0), (3, 0)]
    assert progress_of(saver) == {"step": 3, "images_seen": 12}
    assert method.progress.step == 3
    assert trainer.should_stop
    assert saver.interrupted_by == number
    assert handlers() == before


def test_signal_between_micro_batches_waits_for_the_step(make_method, train, at, tmp_path):
    saver = Watched(str(tmp_path / "checkpoints"))
    method = make_method()
    callbacks = [at(3, lambda _: signal.raise_signal(signal.SIGTERM)), saver]
    train(method, steps=9, accumulate=3, batch_size=6, callbacks=callbacks)
    # It came in the first of the three micro-batches of step 2.
    assert saver.saves == [(2, 0)]
    assert progress_of(saver) == {"step": 2, "images_seen": 12}
    assert method.progress.step == 2


def test_second_ctrl_c_stops_at_once(make_method, train, saver, at):
    before = handlers()

    def twice(_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(SystemExit):
        train(make_method(), steps=9, callbacks=[at(3, twice), saver])
    assert saver.saves == [(2, 0)]
    assert handlers() == before


def test_signals_are_given_back_after_an_exception(make_method, train, saver, at):
    before, inside = handlers(), []

    def fail(_):
        inside.extend(handlers())
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        train(make_method(), callbacks=[at(1, fail), saver])
    assert inside != before
    assert handlers() == before


def test_signals_are_given_back_at_the_end(make_method, train, saver):
    before = handlers()
    train(make_method(), callbacks=[saver])
    assert handlers() == before


def test_trains_outside_the_main_thread(make_method, train, saver):
    thread = threading.Thread(target=train, args=(make_method(),), kwargs={"steps": 3, "callbacks": [saver]})
    thread.start()
    thread.join(600)
    assert progress_of(saver)["step"] == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_leave_the_old_file(make_method, train, saver, at, value):
    before, kept = handlers(), []

    def spoil(method):
        kept.append(saver.path.read_bytes())
        with torch.no_grad():
            next(method.denoiser.parameters()).flatten()[0] = value

    with pytest.raises(FloatingPointError, match=r"not finite.*last\.ckpt was not written"):
        train(make_method(), callbacks=[at(3, spoil, end=True), saver])
    assert saver.saves == [(2, 0), (4, 0)]
    assert saver.path.read_bytes() == kept[0]
    assert progress_of(saver)["step"] == 2
    assert [path.name for path in saver.path.parent.iterdir()] == ["last.ckpt"]
    assert handlers() == before


def test_write_that_breaks_off_leaves_the_old_file(make_method, train, saver):
    def full_disk_later(trainer):
        write = trainer.save_checkpoint

        def save(path):
            if saver.path.exists():
                path.write_bytes(b"half")
                raise OSError("no space left")
            write(path)

        trainer.save_checkpoint = save

    with pytest.raises(OSError, match="no space left"):
        train(make_method(), callbacks=[saver], prepare=full_disk_later)
    assert progress_of(saver)["step"] == 2


def test_refuses_an_interval():
    with pytest.raises(ValueError, match="every_n_steps"):
        RunCheckpoint("folder", every_n_steps=0)


def test_full_disk_is_a_loud_error(make_method, train, saver, at):
    """The system refuses to write on: torch's own word for it would be that a stream failed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = at(3, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1])))
    try:
        with pytest.raises(OSError, match=r"could not be written to .*checkpoints \(File too large\).*Free space"):
            train(make_method(), steps=6, callbacks=[saver, fill])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert progress_of(saver)["step"] == 2
    assert [path.name for path in saver.path.parent.iterdir()] == ["last.ckpt"]


def test_lost_folder_is_a_loud_error(make_method, train, saver, at):
    lose = at(3, lambda _: saver.path.parent.rename(saver.path.parent.with_name("elsewhere")))
    with pytest.raises(OSError, match="No such file or directory"):
        train(make_method(), steps=6, callbacks=[saver, lose])
    assert not saver.path.parent.exists()  # a new one would hide the loss


def test_memory_that_lies_is_noticed(make_method, train, saver, monkeypatch):
    """What was written is read back before it takes the place of the last one."""

    write = torch.save

    def flip(checkpoint, file):
        memory = io.BytesIO()
        write(checkpoint, memory)
        data = bytearray(memory.getvalue())
        weight = next(value for value in checkpoint["state_dict"].values() if isinstance(value, torch.Tensor))
        data[data.index(weight.numpy().tobytes())] ^= saver.path.exists()
        file.write(data)

    monkeypatch.setattr(torch, "save", flip)
    with pytest.raises(OSError, match=r"last\.partial does not read back .*last\.ckpt is as it was"):
        train(make_method(), steps=6, callbacks=[saver])
    assert progress_of(saver)["step"] == 2
