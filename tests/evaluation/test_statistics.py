import numpy as np
import pytest
import torch

from consistency.evaluation.statistics import FeatureMoments, FeatureStatistics


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


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_samples(count):
    with pytest.raises(ValueError, match=f"at least 2 samples, got {count}"):
        _ = FeatureMoments(3).add(torch.zeros(count, 3)).covariance


def statistics(features, logits, order, batch_size, **options):
    """Statistics of samples that come in an order, in batches."""
    dim, classes = features.shape[1], logits.shape[1]
    result = FeatureStatistics(dim, classes, total=len(features), keep_features=True, **options)
    for indices in order.split(batch_size):
        result.add(features[indices], logits[indices], indices)
    result.all_reduce()
    return result


def test_order_and_batches_do_not_matter():
    features, logits = torch.randn(103, 7), 3 * torch.randn(103, 5)
    whole = statistics(features, logits, torch.arange(103), 103)
    parts = statistics(features, logits, torch.randperm(103), 9)
    torch.testing.assert_close(parts.moments.mean, whole.moments.mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts.moments.covariance, whole.moments.covariance, rtol=1e-12, atol=1e-14)
    assert torch.equal(parts.features, features)  # in the order of the indices
    assert parts.inception_score() == pytest.approx(whole.inception_score(), rel=1e-12)


def test_nothing_is_kept_that_is_not_asked_for():
    result = FeatureStatistics(7, 0, total=10, keep_features=False)
    result.add(torch.randn(10, 7), torch.randn(10, 5), torch.arange(10))
    result.all_reduce()
    assert result.features is None
    elements = sum(value.numel() for value in vars(result).values() if isinstance(value, torch.Tensor))
    assert elements <= 10 + 10 + 10  # which came, their splits, one number a split
    with pytest.raises(ValueError, match="needs logits"):
        result.inception_score()


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 1, 2], "4 samples were announced, 3 came, 3 of them distinct"),
        ([0, 1, 2, 2], "4 samples were announced, 4 came, 3 of them distinct"),
        ([0, 1, 2, 3, 3], "4 samples were announced, 5 came, 4 of them distinct"),
    ],
)
def test_missing_and_repeated_samples(indices, message):
    result = FeatureStatistics(2, 0, total=4, keep_features=False)
    result.add(torch.randn(len(indices), 2), torch.zeros(len(indices), 0), torch.tensor(indices))
    with pytest.raises(ValueError, match=message):
        result.all_reduce()


@pytest.mark.parametrize("index", [-1, 4])
def test_foreign_indices(index):
    result = FeatureStatistics(2, 0, total=4, keep_features=False)
    with pytest.raises(ValueError, match=r"indices in \[0, 4\)"):
        result.add(torch.randn(1, 2), torch.zeros(1, 0), torch.tensor([index]))


def test_inception_score_of_known_answers():
    features, certain = torch.zeros(1000, 1), 1000 * torch.eye(10).repeat(100, 1)  # probabilities underflow to 0
    mean, std = statistics(features, certain, torch.arange(1000), 64, splits=1).inception_score()
    assert mean == pytest.approx(10, rel=1e-12)  # all classes alike, each for certain
    assert std == 0
    collapsed = certain[:1].expand(1000, -1)
    assert statistics(features, collapsed, torch.arange(1000), 64).inception_score() == pytest.approx((1, 0))
    unsure = torch.zeros(1000, 10)
    assert statistics(features, unsure, torch.arange(1000), 64).inception_score() == pytest.approx((1, 0))
