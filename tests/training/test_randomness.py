from itertools import product
from types import SimpleNamespace

import pytest
import torch

from consistency.methods.progress import Progress
from consistency.training.randomness import StepSeeds


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
