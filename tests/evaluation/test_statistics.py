import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from consistency.evaluation.statistics import FeatureMoments, frechet_distance


def moments_of(mean, covariance, count=1000):
    """Moments with exactly this mean and covariance."""
    moments = FeatureMoments(len(mean))
    moments.count, moments.total = count, mean * count
    moments.outer = covariance * (count - 1) + torch.outer(mean, mean) * count
    return moments


def random_spd(dim, generator):
    root = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    return root @ root.T / dim


def test_mean_and_covariance_are_numpys():
    features = torch.randn(50, 7) * torch.arange(1, 8) + 3
    moments = FeatureMoments(7).add(features)
    assert moments.count == 50
    np.testing.assert_allclose(moments.mean, features.double().numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(features.double().numpy().T), rtol=1e-9, atol=1e-12)


def test_batches_add_up():
    features = torch.randn(100, 5)
    whole, parts = FeatureMoments(5).add(features), FeatureMoments(5)
    for batch in features.split(33):
        assert parts.add(batch) is parts
    assert parts.count == whole.count
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-12, atol=1e-14)
    assert frechet_distance(parts, whole) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_float64(dtype):
    # In float32 the variance around a large mean is lost.
    features = (torch.randn(20_000, 2, dtype=torch.float64) + 1000).to(dtype)
    moments = FeatureMoments(2)
    for batch in features.split(1000):
        moments.add(batch)
    assert moments.mean.dtype == moments.covariance.dtype == torch.float64
    np.testing.assert_allclose(moments.covariance, np.cov(features.double().numpy().T), rtol=1e-6, atol=1e-8)


def test_gradients_are_not_kept():
    moments = FeatureMoments(2).add(torch.randn(3, 2, requires_grad=True))
    assert not moments.mean.requires_grad


@pytest.mark.parametrize("count", [3, 40, 1000])
def test_distance_to_itself_is_nothing(count):
    # Few samples too: their covariance is singular, and the root of the product ill-defined.
    moments = FeatureMoments(64).add(torch.randn(count, 64))
    assert 0 <= frechet_distance(moments, moments) < 1e-3


def test_closed_form_for_independent_coordinates():
    mean_a, mean_b = torch.tensor([[0.0, 1.0, -2.0], [0.5, 1.0, 3.0]], dtype=torch.float64)
    std_a, std_b = torch.tensor([[1.0, 2.0, 0.5], [3.0, 2.0, 0.0]], dtype=torch.float64)
    a, b = moments_of(mean_a, std_a.square().diag()), moments_of(mean_b, std_b.square().diag())
    expected = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-9)


def test_samples_of_two_gaussians():
    a = FeatureMoments(2).add(torch.randn(200_000, 2))
    b = FeatureMoments(2).add(3 * torch.randn(200_000, 2) + torch.tensor([1.0, -2.0]))
    assert frechet_distance(a, b) == pytest.approx(5 + 2 * 4, rel=0.02)


@pytest.mark.parametrize("dim", [2, 8, 33])
def test_scipys_root(dim):
    generator = torch.Generator().manual_seed(dim)
    cov_a, cov_b = random_spd(dim, generator), 2 * random_spd(dim, generator)
    mean_a, mean_b = torch.randn(2, dim, dtype=torch.float64, generator=generator)
    root = sqrtm((cov_a @ cov_b).numpy())
    expected = (mean_a - mean_b).square().sum() + (cov_a + cov_b).trace() - 2 * float(np.trace(root).real)
    distance = frechet_distance(moments_of(mean_a, cov_a), moments_of(mean_b, cov_b))
    assert distance == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_samples(count):
    with pytest.raises(ValueError, match=f"at least 2 samples, got {count}"):
        _ = FeatureMoments(3).add(torch.zeros(count, 3)).covariance
