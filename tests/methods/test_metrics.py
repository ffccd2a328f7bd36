import math

import pytest
import torch
from torch.testing import assert_close

from consistency.methods.metrics import l1, l2, pseudo_huber

METRICS = [l1, l2, pseudo_huber]


@pytest.mark.parametrize(("metric", "expected"), [(l1, [1.0, 0.5]), (l2, [1.0, 1.0])])
def test_means_over_pixels(metric, expected):
    a = torch.zeros(2, 1, 2, 2)
    b = torch.tensor([[1.0, -1.0, 1.0, -1.0], [2.0, 0.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    assert_close(metric(a, b), torch.tensor(expected))


# iCT: c = 0.00054 sqrt(C H W); at a = b + 0.1 the norm is 0.1 sqrt(C H W).
@pytest.mark.parametrize(
    ("shape", "c", "expected"),
    [
        ((3, 32, 32), 0.029929838, 5.512714),
        ((3, 64, 64), 0.059859676, 11.025427),
        ((1, 28, 28), 0.01512, None),
        ((1, 32, 32), 0.01728, None),
    ],
)
def test_pseudo_huber_of_a_constant_difference(shape, c, expected):
    a = torch.zeros(2, *shape, dtype=torch.float64)
    value = pseudo_huber(a, a + 0.1)
    assert_close(value, pseudo_huber(a, a + 0.1, c=c), rtol=1e-7, atol=0)
    assert_close(value, torch.full_like(value, math.sqrt(0.01 * math.prod(shape) + c**2) - c))
    if expected is not None:
        assert value.tolist() == pytest.approx([expected] * 2, abs=1e-6)


def test_pseudo_huber_takes_the_norm_of_the_sample_not_of_pixels():
    a, b = torch.zeros(1, 1, 1, 2), torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
    assert float(pseudo_huber(a, b, c=0)) == 5
    assert float(pseudo_huber(a, b, c=12)) == 1


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away():
    def value(difference):
        a = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        return float(pseudo_huber(a, a + difference, c=1.0))

    assert value(2e-4) / value(1e-4) == pytest.approx(4, rel=1e-4)
    assert value(2e4) / value(1e4) == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize("difference", [1e-6, 1e-4, 1e-2, 1.0])
def test_pseudo_huber_and_its_gradient_keep_their_digits_in_float32(difference):
    """Near zero, where the difference of the two roots would leave nothing of float32."""
    values, slopes = [], []
    for dtype in (torch.float32, torch.float64):
        a = torch.full((1, 3, 4, 4), difference, dtype=dtype, requires_grad=True)
        value = pseudo_huber(a, torch.zeros_like(a), c=0.03)
        value.sum().backward()
        values.append(value.double())
        slopes.append(a.grad.double())
    assert_close(values[0], values[1], rtol=1e-6, atol=0)
    assert_close(slopes[0], slopes[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_is_a_symmetric_distance_per_sample(metric):
    a, b = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    value = metric(a, b)
    assert value.shape == (3,)
    assert (value > 0).all()
    assert_close(metric(b, a), value)
    assert torch.equal(metric(a, a), torch.zeros(3))  # by the formula, on every CPU
    assert_close(metric(a[1:2], b[1:2]), value[1:2])


@pytest.mark.parametrize("metric", METRICS)
def test_does_not_clamp(metric):
    a = torch.full((1, 1, 2, 2), 2.0, requires_grad=True)
    metric(a, torch.full((1, 1, 2, 2), 1.5)).sum().backward()
    assert (a.grad > 0).all()


@pytest.mark.parametrize("c", [None, 0, 0.03])
def test_pseudo_huber_of_equal_images_has_no_gradient(c):
    a = torch.randn(2, 1, 2, 2, requires_grad=True)
    b = a.detach().clone()
    b[1] += 1  # one row differs: the zero of the other must not spread
    pseudo_huber(a, b, c=c).sum().backward()
    assert torch.equal(a.grad[0], torch.zeros(1, 2, 2))
    assert (a.grad[1] < 0).all()


def test_plain_norm_has_unit_slope():
    a = torch.randn(3, 1, 2, 2, requires_grad=True)
    pseudo_huber(a, torch.zeros(3, 1, 2, 2), c=0).sum().backward()
    assert_close(a.grad.flatten(1).norm(dim=1), torch.ones(3))
