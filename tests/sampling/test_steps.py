from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from consistency.noise.grids import karras_grid
from consistency.sampling.steps import euler_step, heun_step, ode_derivative

STEPS = [euler_step, heun_step]


def gaussian(x, sigma, labels=None):
    """The exact denoiser of data N(0, 0.5^2)."""
    return x * (0.25 / (0.25 + sigma**2)).view(-1, 1, 1, 1)


def flow(x, a, b):
    """The exact solution of the probability flow ODE of that data from level a to b."""
    return x * ((0.25 + b**2) / (0.25 + a**2)) ** 0.5


def levels(*values):
    return [torch.tensor([value], dtype=torch.float64) for value in values]


# One distillation step between the levels 20 and 21 (from the top) of 40, from x = 3.
@pytest.mark.parametrize(("step", "expected"), [(euler_step, 2.396387791), (heun_step, 2.401112732)])
def test_one_step(step, expected):
    sigma_lo, sigma_hi = karras_grid(40)[18:20].split(1)
    x = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    assert float(step(gaussian, x, sigma_hi, sigma_lo)) == pytest.approx(expected, abs=1e-9)
    assert float(flow(x, sigma_hi, sigma_lo)) == pytest.approx(2.400170995, abs=1e-9)


def test_euler_along_the_line_of_image_and_noise():
    # With the clean image as denoiser Euler is exact: consistency training's x + sigma_lo z.
    sigma_lo, sigma_hi = karras_grid(40)[18:20].split(1)
    x, z = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (0.3, -1.2))
    x_lo = euler_step(lambda *_: x, x + sigma_hi * z, sigma_hi, sigma_lo)
    assert float(x_lo) == pytest.approx(-1.820643310, abs=1e-8)
    assert_close(x_lo, x + sigma_lo * z)


@pytest.mark.parametrize(("step", "evaluated"), [(euler_step, [2.0]), (heun_step, [2.0, 0.5])])
def test_levels_and_labels_that_the_teacher_sees(step, evaluated):
    seen, labels = [], torch.tensor([7])

    def teacher(x, sigma, labels):
        seen.append((float(sigma), labels))
        return gaussian(x, sigma)

    step(teacher, torch.ones(1, 1, 2, 2), torch.tensor([2.0]), torch.tensor([0.5]), labels)
    assert seen == [(sigma, labels) for sigma in evaluated]


@pytest.mark.parametrize(("step", "order"), [(euler_step, 1), (heun_step, 2)])
def test_order_of_convergence(step, order):
    errors = []
    for num in (16, 32):
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        sigmas = torch.linspace(2, 0.5, num + 1, dtype=torch.float64)
        for sigma, sigma_next in pairwise(sigmas):
            x = step(gaussian, x, sigma.view(1), sigma_next.view(1))
        errors.append(abs(float(x) - float(flow(torch.ones(1), 2.0, 0.5))))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_euler_step_to_zero_is_the_denoised_image():
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    sigma, zero = levels(3.0, 0.0)
    assert_close(euler_step(gaussian, x, sigma, zero), gaussian(x, sigma))


@pytest.mark.parametrize("step", STEPS)
def test_each_image_has_its_own_levels(step):
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    sigma, sigma_next = (torch.tensor(pair, dtype=torch.float64) for pair in ([5.0, 1.0], [4.0, 0.1]))
    together = step(gaussian, x, sigma, sigma_next)
    for row in range(2):
        rows = slice(row, row + 1)
        assert_close(together[rows], step(gaussian, x[rows], sigma[rows], sigma_next[rows]))


def test_derivative():
    x, denoised = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 1.0)
    assert ode_derivative(x, denoised, torch.tensor([2.0, 4.0])).flatten().tolist() == [1.0, 0.5]
