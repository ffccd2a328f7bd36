from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from consistency.data.image_files import image_grid
from consistency.ops import to_uint8
from consistency.training.averaging import WeightEMA
from consistency.training.evaluation import SampleGrid


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class Sampler:
    """Half the noise, noting what it was called with and the numbers of a generator that it disturbs."""

    def __init__(self):
        self.calls = []

    def __call__(self, denoiser, noise, labels, randn_like):
        torch.rand(3)
        self.calls.append(
            SimpleNamespace(
                weights=flat(denoiser.parameters()),
                training=denoiser.training,
                grad=torch.is_grad_enabled(),
                noise=noise,
                labels=labels,
            )
        )
        return noise / 2


@pytest.fixture
def sampler():
    return Sampler()


@pytest.fixture
def grid(tmp_path, sampler):
    def make(**options):
        return SampleGrid(str(tmp_path / "samples"), {"half": sampler}, **{"num_samples": 4, **options})

    return make


def written(tmp_path):
    return sorted(int(path.stem.split("_")[1]) for path in (tmp_path / "samples").iterdir())


@pytest.mark.parametrize(
    ("every", "expected"), [(0, [20]), (8, [8, 16, 20]), (6, [8, 12, 20]), (20, [20]), (1, [4, 8, 12, 16, 20])]
)
def test_when(make_method, train, grid, sampler, tmp_path, every, expected):
    train(make_method(), steps=5, callbacks=[grid(every_n_images=every)])
    assert written(tmp_path) == expected
    assert len(sampler.calls) == len(expected)


def test_only_after_whole_steps(make_method, train, grid, sampler, tmp_path):
    train(make_method(), steps=3, accumulate=2, batch_size=8, callbacks=[grid(every_n_images=4)])
    assert written(tmp_path) == [8, 16, 24]
    assert len(sampler.calls) == 3


def test_resumed_run_waits_for_the_next_multiple(make_method, train, grid, tmp_path):
    method = make_method()
    method.progress.set_extra_state({"step": 2, "images_seen": 8})
    train(method, steps=5, callbacks=[grid(every_n_images=8)])
    assert written(tmp_path) == [16, 20]


def test_only_rank_0_draws(make_method, grid, sampler):
    method, callback = make_method(), grid()
    method.progress.total_steps = 0
    callback.on_train_batch_end(SimpleNamespace(is_global_zero=False), method, None, None, 0)
    assert sampler.calls == []


def test_draws_with_the_average_and_puts_the_raw_weights_back(make_method, train, grid, sampler):
    average, method = WeightEMA([0.9, 0.5], warmup=False), make_method()
    raw = []

    class Spy(SampleGrid):
        def draw(self, trainer, pl_module):
            raw.append(flat(pl_module.denoiser.parameters()))
            super().draw(trainer, pl_module)

    callback = grid()
    callback.__class__ = Spy
    train(method, steps=2, callbacks=[average, callback])
    (call,) = sampler.calls
    assert torch.equal(call.weights, flat(average.averages["ema0.9"].values()))
    assert not torch.equal(call.weights, raw[0])
    assert torch.equal(flat(method.denoiser.parameters()), raw[0])


def test_draws_with_the_raw_weights_where_there_is_no_average(make_method, train, grid, sampler):
    method = make_method()
    train(method, steps=2, callbacks=[grid()])
    assert torch.equal(sampler.calls[0].weights, flat(method.denoiser.parameters()))


def test_mode_and_gradients(make_method, train, grid, sampler, outputs):
    class Modes(outputs):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.seen.append((pl_module.denoiser.training, torch.is_grad_enabled()))

    modes = Modes()
    train(make_method(), steps=3, callbacks=[grid(every_n_images=4), modes])
    assert [(call.training, call.grad) for call in sampler.calls] == [(False, False)] * 3
    assert modes.seen == [(True, True)] * 3


def test_same_seeds_each_time(make_method, train, grid, sampler):
    train(make_method(), steps=2, callbacks=[grid(every_n_images=4), grid(seed=1)])
    first, second, other = (call.noise for call in sampler.calls)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert len(first.flatten(1).unique(dim=0)) == 4


def test_labels_of_conditional_models(make_method, make_denoiser, train, grid, sampler):
    train(make_method(make_denoiser(num_classes=3)), steps=1, callbacks=[grid(num_samples=5)])
    assert sampler.calls[0].labels.tolist() == [0, 1, 2, 0, 1]
    train(make_method(), steps=1, callbacks=[grid()])
    assert sampler.calls[1].labels is None


class Wandb:
    """Takes pictures as wandb's logger does."""

    def __init__(self):
        self.pictures = []

    def log_image(self, key, images, step):
        self.pictures.append((key, images, step))


class TensorBoard:
    """Takes pictures as TensorBoard's writer does."""

    def __init__(self):
        self.pictures = []
        self.experiment = self

    def add_image(self, name, image, global_step):
        self.pictures.append((name, image, global_step))


@pytest.mark.parametrize("averages", [[], [WeightEMA([0.999])]], ids=["raw", "ema"])
def test_pictures(make_method, train, grid, sampler, rows, tmp_path, averages):
    one, other = Wandb(), TensorBoard()

    class WandbRows(rows):
        log_image = staticmethod(one.log_image)

    class TensorBoardRows(rows):
        experiment = other

    loggers = [rows(), WandbRows(), TensorBoardRows()]
    train(make_method(), steps=3, callbacks=[*averages, grid()], loggers=loggers)
    expected = image_grid(to_uint8(sampler.calls[0].noise / 2)).permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples" / "half_000000012.png")), expected)
    ((key, (picture,), step),) = one.pictures
    assert (key, step) == ("samples/half", 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, expected)
    ((name, image, step),) = other.pictures
    assert (name, step) == (key, 3)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
