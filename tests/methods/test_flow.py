"""Flow matching against its own formulas, written in the time of the path: x_t = (1 - t) z + t x, velocity x - z."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from consistency.methods.edm import EDM
from consistency.models.denoiser import Denoiser
from consistency.models.parametrization import Flow
from consistency.models.register import build
from consistency.noise import weightings
from consistency.noise.grids import uniform_time
from consistency.noise.levels import FixedLevel, UniformTime
from consistency.sampling.samplers import OdeSampler, sample_euler
from given import AsGiven

CPU = torch.device("cpu")


@pytest.fixture
def model(make_unet):
    return Denoiser(make_unet(), Flow()).eval()


def velocity(model, x_t, time):
    """The network at a time of the path: it is told of the level by c_noise = ln(sigma) / 4."""
    return model.network(x_t, 0.25 * ((1 - time) / time).log())


def test_loss_is_that_of_the_velocity(model, fixed_random):
    x, z = torch.rand(8, 1, 4, 4) * 2 - 1, torch.randn(8, 1, 4, 4)
    time = torch.linspace(0.05, 0.95, 8)
    at = time.view(-1, 1, 1, 1)
    expected = (velocity(model, (1 - at) * z + at * x, time) - (x - z)).square().flatten(1).mean(1)
    sigma = (1 - time) / time
    method = EDM(model, levels=AsGiven("level"), weighting=weightings.velocity, optimizer=torch.optim.SGD)
    step = method.step(x, torch.full((8,), -1), 0, fixed_random(sigma, z))
    assert_close(step.loss, expected, rtol=1e-4, atol=1e-5)


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
    sigma = UniformTime()(0, torch.rand(20_000, dtype=torch.float64))
    time = 1 / (1 + sigma)
    assert float(time.min()) >= 1 / 81 - 1e-6
    assert float(time.max()) < 1
    assert_close(torch.histc(time, 4, 1 / 81, 1) / 20_000, torch.full((4,), 0.25), atol=0.02, rtol=0)


def test_boundary_shifts_the_coefficients_to_the_identity(make_unet):
    coefficients = Flow(boundary=0.002)(torch.tensor([0.002]))
    assert (coefficients.skip, coefficients.out) == (1, 0)
    student = Denoiser(make_unet(), Flow(boundary=0.002)).eval()
    x = torch.randn(3, 1, 4, 4)
    assert torch.equal(student(x, torch.full((3,), 0.002)), x)


def test_unknown_parametrizations_are_refused():
    with pytest.raises(ValueError, match=r"parametrization 'nothing' is not registered here; known: edm, flow, "):
        build("parametrization", {"name": "nothing", "arguments": {}})
    with pytest.raises(ValueError, match=r"parametrization 'flow' does not take these arguments: .*sigma_data"):
        build("parametrization", {"name": "flow", "arguments": {"sigma_data": 0.5}})


def test_fixed_level_trains_one_level(make_denoiser, fit, record):
    method = EDM(
        make_denoiser(boundary=0.0),
        levels=FixedLevel(0.5),
        weighting=weightings.edm,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    calls = record(method.denoiser)
    fit(method)
    assert (calls[0].sigma == 0.5).all()
