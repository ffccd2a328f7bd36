from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from consistency.data.datasets import ImageArray, digits
from consistency.data.module import ImageDataModule, ShuffledBatches, warn_about_sigma_data
from consistency.methods.progress import Progress


def batches(count, num_images=10, batch_size=3, **options):
    return list(islice(ShuffledBatches(num_images, batch_size, **{"seed": 0, **options}), count))


def flat(lists):
    return [index for part in lists for index in part]


def test_each_epoch_is_a_permutation():
    seen = flat(batches(20))
    epochs = [tuple(seen[start : start + 10]) for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 6


def test_function_of_the_seed():
    torch.manual_seed(1)
    first = batches(10, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert batches(10, seed=3) == first
    assert batches(10, seed=4) != first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("start", [0, 3, 9, 10, 12, 30, 7])
def test_continues_exactly_where_it_stopped(start):
    straight = flat(batches(30))
    assert flat(batches(10, start=lambda: start)) == straight[start : start + 30]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_partition_each_global_batch(world_size):
    straight = batches(12, batch_size=3 * world_size)
    ranks = [batches(12, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, whole in enumerate(straight):
        assert flat(rank[step] for rank in ranks) == whole


def test_ranks_continue_too():
    straight = batches(8, rank=1, world_size=2)
    assert batches(4, rank=1, world_size=2, start=lambda: 4 * 6) == straight[4:]


def test_start_is_asked_when_iteration_begins():
    seen = 0
    sampler = ShuffledBatches(10, 3, seed=0, start=lambda: seen)
    straight = batches(4)
    seen = 6
    assert list(islice(sampler, 2)) == straight[2:]


def test_batch_larger_than_the_data():
    (batch,) = batches(1, num_images=4, batch_size=10)
    assert sorted(batch[:4]) == sorted(batch[4:8]) == [0, 1, 2, 3]


IMAGES = torch.arange(12 * 2 * 4 * 4).remainder(251).to(torch.uint8).view(12, 2, 4, 4)


class Plain(Dataset):
    """A data set of single items, as torchvision's."""

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return IMAGES[index], index % 3


def module(dataset=None, **options):
    dataset = ImageArray(IMAGES, torch.arange(12) % 3) if dataset is None else dataset
    settings = {"batch_size": 4, "seed": 0, "image_size": 4, "channels": 2, "num_classes": 3}
    return ImageDataModule(dataset, **{**settings, **options})


def first_batches(data, count=5, *, progress=None, **trainer):
    method = SimpleNamespace(progress=progress or Progress())
    trainer = {"world_size": 1, "global_rank": 0, "accumulate_grad_batches": 1, **trainer}
    data.trainer = SimpleNamespace(lightning_module=method, **trainer)
    return list(islice(data.train_dataloader(), count))


def equal(some, others):
    return len(some) == len(others) and all(
        torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(some, others, strict=True)
    )


def test_batches_are_those_of_the_sampler():
    for (images, labels), indices in zip(first_batches(module()), batches(5, 12, 4), strict=True):
        assert torch.equal(images, IMAGES[indices])
        assert labels.tolist() == [index % 3 for index in indices]


def test_starts_where_the_run_stands():
    progress = Progress()
    progress.images_seen = 8
    assert equal(first_batches(module(), 3, progress=progress), first_batches(module(), 5)[2:])


def test_ranks_and_micro_batches_cut_the_same_batch():
    whole = torch.cat([images for images, _ in first_batches(module(), 2)])
    micro = [images for images, _ in first_batches(module(), 4, accumulate_grad_batches=2)]
    assert torch.equal(torch.cat(micro), whole)
    one, other = ([i for i, _ in first_batches(module(), 2, world_size=2, global_rank=rank)] for rank in (0, 1))
    assert torch.equal(torch.cat([one[0], other[0], one[1], other[1]]), whole)


def test_data_set_of_single_items():
    assert equal(first_batches(module(Plain())), first_batches(module()))
    assert module(Plain()).sigma_data() == module().sigma_data()


@pytest.mark.parametrize("dataset", [None, Plain()], ids=["batches", "items"])
def test_workers_give_the_same_batches(dataset):
    assert equal(first_batches(module(dataset, num_workers=2), 8), first_batches(module(dataset), 8))


def test_function_is_called_once_when_needed():
    calls = []

    def make():
        calls.append(1)
        return Plain()

    data = module(make)
    assert not calls
    data.setup("fit")
    data.setup("fit")
    first_batches(data)
    assert len(calls) == 1


def test_images_on_the_device_lie_between_minus_one_and_one():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1, 1)
    floats, labels = module().on_after_batch_transfer((images, torch.arange(3)), 0)
    assert floats.dtype == torch.float32
    assert floats.flatten().tolist() == pytest.approx([-1, 1, -0.6])
    assert labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 8}, r"\[2, 4, 4\], the configuration says \[2, 8, 8\]"),
        ({"channels": 1}, r"data\.channels"),
        ({"num_classes": 2}, r"label 2, the configuration says 2 classes; change data\.num_classes"),
    ],
)
def test_data_that_is_not_what_the_configuration_says(options, words):
    with pytest.raises(ValueError, match=words):
        module(**options).setup("fit")


@pytest.mark.parametrize("options", [{}, {"num_classes": 0}, {"num_classes": 10}])
def test_data_that_fits(options):
    module(**options).setup("fit")


@pytest.mark.parametrize(("world_size", "accumulate"), [(3, 1), (1, 8), (2, 4)])
def test_batch_that_does_not_divide(world_size, accumulate):
    with pytest.raises(ValueError, match=r"data\.batch_size=4 .* divisible"):
        first_batches(module(), world_size=world_size, accumulate_grad_batches=accumulate)


def test_empty_batch():
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        module(batch_size=0)


def test_sigma_data_of_digits():
    data = module(digits, image_size=8, channels=1, num_classes=10)
    assert data.sigma_data() == pytest.approx(0.75, abs=0.01)
    # A part says nearly as much, and always the same.
    assert data.sigma_data(max_images=500) == pytest.approx(0.75, abs=0.02)
    assert data.sigma_data(max_images=500) == data.sigma_data(max_images=500)


def test_sigma_data_is_around_the_mean_of_each_channel():
    levels = torch.tensor([[0, 255], [100, 100]], dtype=torch.uint8)  # [channel, image]
    images = levels.T.reshape(2, 2, 1, 1).expand(2, 2, 4, 4)
    # Standard deviation 1 in one channel, none in the other.
    assert module(ImageArray(images, torch.zeros(2))).sigma_data() == pytest.approx(0.5**0.5, rel=1e-5)


@pytest.mark.parametrize("measured", [0.39, 0.41, 0.5, 0.59, 0.61])
def test_warning_about_sigma_data(caplog, measured):
    warned = measured in (0.39, 0.61)
    warn_about_sigma_data(measured, 0.5)
    assert bool(caplog.records) == warned
    assert (f"Set noise.sigma_data={measured:.2f}" in caplog.text) == warned
