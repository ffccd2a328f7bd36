"""Flow matching against its own formulas, written in the time of the path: x_t = (1 - t) z + t x, velocity x - z."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from consistency.losses.denoising import denoising_loss
from consistency.methods.edm import EDM
from consistency.models.denoiser import Denoiser, flow_scalings
from consistency.noise import weightings
from consistency.noise.draws import FixedLevel, UniformTime
from consistency.noise.grids import uniform_time
from consistency.sampling.samplers import OdeSampler, sample_euler

CPU = torch.device("cpu")


@pytest.fixture
def model(make_unet):
    return Denoiser(make_unet(), boundary=0.0, scalings="flow").eval()


def velocity(model, x_t, time):
    """The network at a time of the path: it is told of the level by c_noise = ln(sigma) / 4."""
    return model.network(x_t, 0.25 * ((1 - time) / time).log())


def test_loss_is_that_of_the_velocity(model):
    x, z = torch.rand(8, 1, 4, 4) * 2 - 1, torch.randn(8, 1, 4, 4)
    time = torch.linspace(0.05, 0.95, 8)
    at = time.view(-1, 1, 1, 1)
    expected = (velocity(model, (1 - at) * z + at * x, time) - (x - z)).square().flatten(1).mean(1)
    sigma = (1 - time) / time
    loss = denoising_loss(model, x, z, sigma, weight=weightings.velocity(sigma, sigma))
    assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_levels_of_the_path():
    # t = 1 / (1 + sigma): 0 is noise, 1 is data.
    sigmas = uniform_time(4, sigma_min=0.002, sigma_max=80.0)
    assert_close(1 / (1 + sigmas), torch.linspace(1 / 81, 1, 5, dtype=torch.float64))
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_euler_is_the_plain_integration_of_the_velocity(model):
    steps, z = 6, torch.randn(2, 1, 4, 4, dtype=torch.float64)
    drawn = OdeSampler(sample_euler, num_steps=steps, grid=uniform_time)(model, z)
    first = 1 / (1 + model.sigma_max)
    x = (1 - first) * z
    for step in range(steps):
        time = torch.full((2,), first + (1 - first) * step / steps)
        x = x + (1 - first) / steps * velocity(model, x.float(), time)
    assert_close(drawn, x, rtol=1e-4, atol=1e-5)


def test_uniform_time_draws_the_whole_path():
    sigma = UniformTime()(0, 20_000, CPU)
    time = 1 / (1 + sigma)
    assert float(time.min()) >= 1 / 81 - 1e-6
    assert float(time.max()) < 1
    assert_close(torch.histc(time, 4, 1 / 81, 1) / 20_000, torch.full((4,), 0.25), atol=0.02, rtol=0)


def test_boundary_shifts_the_scalings_to_the_identity(make_unet):
    scalings = flow_scalings(torch.tensor([0.002]), boundary=0.002)
    assert (scalings.skip, scalings.out) == (1, 0)
    student = Denoiser(make_unet(), boundary=0.002, scalings="flow").eval()
    x = torch.randn(3, 1, 4, 4)
    assert torch.equal(student(x, torch.full((3,), 0.002)), x)


def test_unknown_scalings_are_refused(make_unet):
    with pytest.raises(ValueError, match="edm or flow"):
        Denoiser(make_unet(), scalings="vp")


def test_fixed_level_trains_one_level(make_denoiser, fit, record):
    method = EDM(
        make_denoiser(boundary=0.0),
        draw=FixedLevel(0.5),
        weighting=weightings.edm,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    calls = record(method.denoiser)
    fit(method)
    assert (calls[0].sigma == 0.5).all()
