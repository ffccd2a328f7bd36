from itertools import islice
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import Dataset

from consistency.data.datasets import ImageArray, digits
from consistency.data.module import ImageDataModule, ShuffledBatches, warn_about_sigma_data
from consistency.methods.progress import Progress
from consistency.ops import derive_seed, from_uint8


def batches(count, num_images=10, batch_size=3, **options):
    return list(islice(ShuffledBatches(num_images, batch_size, **{"seed": 0, **options}), count))


def flat(lists):
    return [index for part in lists for index in part]


def test_each_epoch_is_a_permutation():
    seen = flat(batches(20))
    epochs = [tuple(seen[start : start + 10]) for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 6


def test_number_of_classes_is_that_of_the_data():
    array = ImageArray(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 2]), classes=["a", "b", "c"])
    options = {"batch_size": 1, "seed": 0, "image_size": 4, "channels": 1}
    for num_classes in (0, 3):
        ImageDataModule(array, num_classes=num_classes, **options).setup("fit")
    with pytest.raises(ValueError, match="has 3 classes, the configuration says 1000"):
        ImageDataModule(array, num_classes=1000, **options).setup("fit")


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
    assert module(Plain()).measure_sigma_data() == module().measure_sigma_data()


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
        ({"dataset": ImageArray(IMAGES, torch.arange(12) - 1), "num_classes": 20}, "label -1"),
        ({"dataset": Plain(), "on_device": True}, r"needs a cache; set data\.dataset\.cache_dir"),
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
    assert data.measure_sigma_data() == pytest.approx(0.75, abs=0.01)
    # A part says nearly as much, and always the same.
    assert data.measure_sigma_data(max_images=500) == pytest.approx(0.75, abs=0.02)
    assert data.measure_sigma_data(max_images=500) == data.measure_sigma_data(max_images=500)


def test_sigma_data_is_around_the_mean_of_each_channel():
    levels = torch.tensor([[0, 255], [100, 100]], dtype=torch.uint8)  # [channel, image]
    images = levels.T.reshape(2, 2, 1, 1).expand(2, 2, 4, 4)
    # Standard deviation 1 in one channel, none in the other.
    assert module(ImageArray(images, torch.zeros(2))).measure_sigma_data() == pytest.approx(0.5**0.5, rel=1e-5)


@pytest.mark.parametrize("measured", [0.39, 0.41, 0.5, 0.59, 0.61])
def test_warning_about_sigma_data(caplog, measured):
    warned = measured in (0.39, 0.61)
    warn_about_sigma_data(measured, 0.5)
    assert bool(caplog.records) == warned
    assert (f"Set data.sigma_data={measured:.2f}" in caplog.text) == warned


class Watch(L.LightningModule):
    """Counts as the methods do, and keeps what its steps were given and where they stood."""

    def __init__(self):
        super().__init__()
        self.weight, self.progress = torch.nn.Parameter(torch.zeros(())), Progress()
        self.batches, self.positions = [], []

    def training_step(self, batch, batch_idx):
        self.batches.append([part.clone() for part in batch])
        self.positions.append(self.progress.images_seen + self.progress.pending)
        self.progress.count(len(batch[0]))
        return self.weight * 0

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([self.weight], lr=1.0)
        optimizer.register_step_post_hook(lambda *_: self.progress.advance())
        return optimizer


def train(data, steps, *, accumulate=1, images_seen=0):
    method = Watch()
    method.progress.images_seen = images_seen
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, accumulate_grad_batches=accumulate, **dict.fromkeys(quiet, False)
    )
    trainer.fit(method, datamodule=data)
    return method


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 2}, {"on_device": True}, {"on_device": True, "num_workers": 1}]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_flips_belong_to_the_position_of_the_step_that_sees_them(options, accumulate):
    """Under Lightning, whatever it or the workers fetch in advance: image for image what the position says."""
    method = train(module(flip=True, batch_size=6, seed=5, **options), 4, accumulate=accumulate)
    size = 6 // accumulate
    assert method.positions == [size * i for i in range(4 * accumulate)]
    order = flat(batches(4 * accumulate, 12, size, seed=5))
    flips = []
    for position, (images, labels) in zip(method.positions, method.batches, strict=True):
        index = order[position : position + size]
        generator = torch.Generator().manual_seed(derive_seed("flip", 5, 0, position))
        mirrored = torch.rand(size, generator=generator) < 0.5
        expected = [IMAGES[i].flip(-1) if flip else IMAGES[i] for i, flip in zip(index, mirrored, strict=True)]
        assert torch.equal(images, from_uint8(torch.stack(expected)))
        assert labels.tolist() == [i % 3 for i in index]
        flips.append(tuple(mirrored.tolist()))
    assert len(set(flips)) > 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_sees_what_the_straight_run_saw(accumulate):
    def make():
        return module(flip=True, augment=shift_brightness, batch_size=6)

    straight = train(make(), 5, accumulate=accumulate)
    resumed = train(make(), 3, accumulate=accumulate, images_seen=12)
    assert resumed.positions == straight.positions[2 * accumulate :]
    for mine, other in zip(resumed.batches, straight.batches[2 * accumulate :], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def shift_brightness(images, generator):
    """An augmentation that says what it did."""
    shifts = torch.rand(len(images), 9, generator=generator)
    return images + shifts[:, :1, None, None], shifts


MANY = ImageArray(torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).repeat(1000, 1, 1, 1), torch.arange(1000))


def transferred(*, images_seen=0, pending=0, rank=0, seed=0, dataset=MANY, **options):
    """All images of a set in one batch, as a step at that place gets them."""
    channels = dataset.images.shape[1]
    data = module(dataset, seed=seed, channels=channels, num_classes=0, **options)
    progress = Progress()
    progress.images_seen, progress.pending = images_seen, pending
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(progress=progress), global_rank=rank)
    return data.on_after_batch_transfer((dataset.images, dataset.labels), 0)


def flipped(**options):
    images, _ = transferred(flip=True, **options)
    return tuple((images[:, 0, 0, 0] > images[:, 0, 0, 3]).tolist())


def test_half_of_the_images_are_mirrored_left_to_right():
    images, labels = transferred(flip=True)
    plain = from_uint8(MANY.images)
    mirrored = torch.tensor(flipped())
    assert torch.equal(images[mirrored], plain[mirrored].flip(-1))
    assert torch.equal(images[~mirrored], plain[~mirrored])
    assert 420 < int(mirrored.sum()) < 580  # 5 standard deviations
    assert torch.equal(labels, MANY.labels)


def test_flips_are_a_function_of_seed_rank_and_position():
    places = [{}, {"images_seen": 4}, {"images_seen": 8}, {"rank": 1}, {"seed": 1}]
    assert len({flipped(**place) for place in places}) == len(places)
    assert flipped(images_seen=4, pending=4) == flipped(images_seen=8)
    torch.manual_seed(1)
    before, state = flipped(), torch.get_rng_state()
    torch.manual_seed(2)
    assert flipped() == before
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_flips_nothing_is_drawn():
    images, _ = transferred(dataset=ImageArray(IMAGES, torch.arange(12)))
    assert torch.equal(images, from_uint8(IMAGES))


def test_augmentation_gets_floats_and_gives_a_third_part():
    images, labels, shifts = transferred(augment=shift_brightness)
    assert shifts.shape == (1000, 9)
    assert torch.equal(images, from_uint8(MANY.images) + shifts[:, :1, None, None])
    assert torch.equal(labels, MANY.labels)
    again, other = (transferred(augment=shift_brightness, images_seen=seen)[2] for seen in (0, 4))
    assert torch.equal(again, shifts)
    assert not torch.equal(other, shifts)
    # Not the numbers of the flips, whose seed has another purpose.
    assert (shifts[:, 0] < 0.5).tolist() != list(flipped())


def test_on_device_the_loader_yields_indices_only():
    data = module(on_device=True)
    assert all(torch.equal(a, torch.tensor(b)) for a, b in zip(first_batches(data), batches(5, 12, 4), strict=True))
    images, labels = data.on_after_batch_transfer(torch.tensor([3, 0]), 0)
    assert torch.equal(images, from_uint8(IMAGES[[3, 0]]))
    assert labels.tolist() == [0, 0]


def test_sigma_data_of_a_set_that_is_decoded_looks_at_fewer_images():
    read = []

    class Slow(Plain):
        def __len__(self):
            return 5000

        def __getitem__(self, index):
            read.append(index)
            return IMAGES[index % 12], 0

    module(Slow()).measure_sigma_data()
    assert len(set(read)) == 1000


def test_the_whole_set_in_memory_whoever_holds_it():
    array = ImageArray(torch.arange(48, dtype=torch.uint8).view(3, 1, 4, 4), torch.tensor([2, 0, 1]))

    class Items(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return array.images[index], int(array.labels[index])

    options = {"batch_size": 1, "seed": 0, "image_size": 4, "channels": 1, "num_classes": 3}
    for dataset in (array, Items()):
        images, labels = ImageDataModule(dataset, **options).in_memory()
        assert torch.equal(images, array.images)
        assert torch.equal(labels, array.labels)
    with pytest.raises(ValueError, match="GB of memory"):
        ImageDataModule(Items(), **options).in_memory(limit=47)
