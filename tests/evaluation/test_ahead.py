"""Batches that a thread draws ahead: the same, in order, no more than two, and nothing goes on after the end."""

import threading

import pytest
import torch

from consistency.evaluation.ahead import drawn_ahead, in_turn
from consistency.evaluation.extractors import PRECISION_LOCK, extract
from consistency.evaluation.protocol import Evaluation
from consistency.evaluation.references import reference_of_images
from consistency.sampling.samplers import ConsistencySampler

CPU = torch.device("cpu")


def running():
    return [thread for thread in threading.enumerate() if thread.name == "consistency-draws-ahead"]


def numbers(count, drawn=None, fail_at=None):
    for number in range(count):
        if number == fail_at:
            raise FloatingPointError("not finite")
        if drawn is not None:
            drawn.append(number)
        yield torch.tensor([number]), torch.tensor([number])


def test_all_batches_in_order():
    with drawn_ahead(numbers(7), CPU) as batches:
        assert [int(images) for images, _ in batches] == list(range(7))
    assert not running()


def test_never_more_than_two_ahead():
    drawn, most = [], 0
    with drawn_ahead(numbers(9, drawn), CPU) as batches:
        for taken, _ in enumerate(batches, start=1):
            threading.Event().wait(0.01)  # the thread would fill any room now
            most = max(most, len(drawn) - taken)
    assert most == 2


def test_an_error_in_the_thread_reaches_the_caller_after_what_was_drawn():
    seen = []

    def take_all():
        with drawn_ahead(numbers(9, fail_at=3), CPU) as batches:
            for images, _ in batches:
                seen.append(int(images))

    with pytest.raises(FloatingPointError, match="not finite"):
        take_all()
    assert seen == [0, 1, 2]
    assert not running()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_with_the_caller(error):
    drawn = []

    def stop_early():
        with drawn_ahead(numbers(1000, drawn), CPU) as batches:
            next(batches)
            raise error

    with pytest.raises(error):
        stop_early()
    assert not running()
    assert len(drawn) <= 4


def test_the_thread_draws_in_the_callers_autocast_without_gradients():
    layer = torch.nn.Linear(2, 2)

    def batches():
        yield layer(torch.ones(1, 2)), torch.is_grad_enabled()

    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), drawn_ahead(batches(), CPU) as drawn:
            (out, with_grad), *_ = drawn
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        assert not out.requires_grad
        assert not with_grad


def test_no_network_runs_while_an_extractor_has_switched_the_precision(make_denoiser, extractor):
    model, held = make_denoiser(), []
    model.register_forward_pre_hook(lambda *_: held.append(PRECISION_LOCK.locked()))
    extractor.register_forward_pre_hook(lambda *_: held.append(PRECISION_LOCK.locked()))
    in_turn(model)(torch.zeros(1, 1, 8, 8), torch.ones(1))
    extract(extractor, torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    assert held == [True, True]
    assert not PRECISION_LOCK.locked()


@pytest.fixture
def protocol(extractor):
    return Evaluation(extractor=lambda *_, **__: extractor, num_samples=52, cache_dir="", batch_size=8, allow_few=True)


def test_scores_are_the_same_to_the_last_bit(protocol, make_denoiser, extractor, random_images):
    reference = reference_of_images(random_images(60), id="some", extractor=extractor, keep_features=False)
    model, told = make_denoiser(num_classes=3).eval(), []
    rows = [
        protocol.measure_sampler(model, ConsistencySampler([3.0]), extractor, reference, seed=1, overlap=overlap,
                                 progress=told.append)
        for overlap in (False, True)
    ]  # fmt: skip
    assert rows[0] == rows[1]
    assert rows[0]["nfe"] == 2
    assert told == 2 * [8, 8, 8, 8, 8, 8, 4]


def test_a_measurement_that_is_given_up_leaves_no_thread(protocol, make_denoiser, extractor, random_images):
    reference = reference_of_images(random_images(60), id="some", extractor=extractor, keep_features=False)

    def give_up(count):
        assert threading.current_thread() is threading.main_thread()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        protocol.measure_sampler(
            make_denoiser().eval(), ConsistencySampler(), extractor, reference, seed=0, overlap=True, progress=give_up
        )
    assert not running()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams exist on CUDA only")
def test_on_cuda_the_batches_are_whole(make_denoiser, extractor, random_images, protocol):
    device = torch.device("cuda")
    reference = reference_of_images(random_images(60), id="some", extractor=extractor.to(device), keep_features=False)
    model = make_denoiser().eval().to(device)
    rows = [
        protocol.measure_sampler(model, ConsistencySampler([3.0]), extractor, reference, seed=1, overlap=overlap)
        for overlap in (False, True)
    ]
    assert rows[0] == rows[1]
