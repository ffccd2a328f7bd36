import copy

import pytest
import torch

from consistency.noise.curricula import FixedDecay
from consistency.training.averaging import TargetEMA, WeightEMA
from consistency.training.checkpointing import RunCheckpoint
from consistency.training.memory import AutoAccumulate, _divisions, fit, fits


def limit(method, images):
    """A device on which a forward pass of more images than this runs out of memory."""

    def check(module, arguments):
        if len(arguments[0]) > images:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried {len(arguments[0])}\nmore")

    method.denoiser.network.register_forward_pre_hook(check)
    return method


class TestAuto:
    @pytest.mark.parametrize(("images", "parts"), [(16, 1), (7, 4)])
    def test_fewest_micro_batches_that_fit(self, make_method, train, outputs, images, parts):
        watch, method = outputs(), limit(make_method(), images)
        trainer = train(method, steps=2, batch_size=16, callbacks=[watch, AutoAccumulate()])
        assert trainer.accumulate_grad_batches == parts
        assert [len(seen.sigma) for seen in watch.seen] == [16 // parts] * 2 * parts
        assert (method.progress.step, method.progress.images_seen) == (2, 32)

    def test_is_the_run_with_that_number(self, make_method, make_denoiser, train):
        denoiser, ends = make_denoiser(dropout=0.2), []
        for callbacks, accumulate in (([AutoAccumulate()], 1), ([], 4)):
            method = make_method(copy.deepcopy(denoiser), num_levels=40, target_decay=FixedDecay(0.9))
            callbacks = [TargetEMA(), WeightEMA([0.5]), *callbacks]
            train(limit(method, 4), steps=3, batch_size=16, accumulate=accumulate, callbacks=callbacks)
            ends.append([*method.parameters(), *callbacks[1].averages["ema0.5"].values()])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))

    def test_resumed_run_keeps_its_number(self, make_method, train, tmp_path):
        saver = RunCheckpoint(str(tmp_path), every_n_steps=2)
        train(limit(make_method(), 4), steps=2, batch_size=16, callbacks=[AutoAccumulate(), saver])
        callbacks = [AutoAccumulate(), RunCheckpoint(str(tmp_path))]
        trainer = train(make_method(), steps=4, batch_size=16, callbacks=callbacks, ckpt=saver.path)
        assert trainer.accumulate_grad_batches == 4

    def test_not_even_one_image(self, make_method, train):
        with pytest.raises(ValueError, match="a single image"):
            train(limit(make_method(), 0), callbacks=[AutoAccumulate()])


def test_probe_leaves_no_trace(make_method, make_denoiser, train, at):
    def count(module, arguments):
        module.counter.add_(1)

    method = limit(make_method(make_denoiser(dropout=0.5), target_decay=FixedDecay(0.5)), 8)
    method.denoiser.network.register_buffer("counter", torch.zeros(()))
    method.denoiser.network.register_forward_pre_hook(count)
    results = []

    def state(method):
        tensors = [*method.state_dict(keep_vars=True).values()]
        tensors = [tensor.detach().clone() for tensor in tensors if isinstance(tensor, torch.Tensor)]
        gradients = [None if p.grad is None else p.grad.clone() for p in method.parameters()]
        random = torch.get_rng_state()
        return tensors, gradients, random, (method.progress.step, method.progress.pending)

    def probe(method):
        before = state(method)
        results.append([fits(method.trainer, method, parts) for parts in (1, 2, 4)])
        after = state(method)
        assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
        for a, b in zip(before[1], after[1], strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
        assert any(gradient is not None for gradient in before[1])
        assert torch.equal(before[2], after[2])
        assert before[3] == after[3]
        assert before[3][1] == 8  # in the middle of a step

    train(method, steps=2, batch_size=16, accumulate=2, callbacks=[TargetEMA(), at(1, probe)])
    assert results == [[False, True, True]]


@pytest.mark.parametrize(
    ("images", "accumulate", "words"),
    [
        (4, 1, r"micro-batches of 16 images \(CUDA out of memory. Tried 16\), 4 fit; .*accumulate_grad_batches=4 or "),
        (3, 2, r"micro-batches of 8 images .*, 2 fit; .*accumulate_grad_batches=8 or =auto"),
        (0, 1, "not even one image fits"),
    ],
)
def test_running_out_of_memory_says_what_fits(make_method, train, monkeypatch, images, accumulate, words):
    run_out(train, limit(make_method(), images), monkeypatch, words, accumulate=accumulate)


def test_running_out_elsewhere_is_told_apart(make_method, train, monkeypatch, at):
    def evaluate(_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    run_out(train, make_method(), monkeypatch, "sampling or evaluation", callbacks=[at(1, evaluate, end=True)])


def run_out(train, method, monkeypatch, words, **options):
    """Train through `fit` until memory runs out; the message is one line."""
    import lightning as L

    plain = L.Trainer.fit
    monkeypatch.setattr(L.Trainer, "fit", lambda trainer, *args, **kwargs: through(plain, trainer, *args, **kwargs))
    with pytest.raises(ValueError, match=words) as error:
        train(method, batch_size=16, **options)
    assert len(str(error.value).splitlines()) == 1


def through(plain, trainer, method, datamodule, ckpt_path, weights_only):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer), "fit", plain)
        fit(trainer, method, datamodule, ckpt_path)


def test_divisions():
    assert _divisions(16, 1) == [1, 2, 4, 8, 16]
    assert _divisions(16, 4) == [1, 2, 4]
    assert _divisions(12, 1) == [1, 2, 4, 12]
    assert _divisions(7, 1) == [1, 7]
