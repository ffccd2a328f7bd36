import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from consistency.evaluation.scores import frechet_distance, kernel_distance, precision_recall
from consistency.evaluation.statistics import FeatureMoments


def moments_of(mean, covariance, count=1000):
    """Moments with exactly this mean and covariance."""
    moments = FeatureMoments(len(mean))
    moments.count, moments.total = count, mean * count
    moments.outer = covariance * (count - 1) + torch.outer(mean, mean) * count
    return moments


def random_spd(dim, generator):
    root = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    return root @ root.T / dim


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


@pytest.mark.parametrize("rank", [3, 20, 64])
def test_singular_covariances(rank):
    # Truth without squaring: the nuclear norm of the product of centred samples.
    x, y = torch.randn(rank + 1, 64, dtype=torch.float64), 2 * torch.randn(50, 64, dtype=torch.float64) + 1
    y[:, 5] = 0  # a dead unit
    a, b = FeatureMoments(64).add(x), FeatureMoments(64).add(y)
    centred = [(z - z.mean(dim=0)) / (len(z) - 1) ** 0.5 for z in (x, y)]
    traces = centred[0].square().sum() + centred[1].square().sum()
    root = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    expected = ((x.mean(dim=0) - y.mean(dim=0)).square().sum() + traces - 2 * root).item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_by_hand():
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(40, 4, dtype=torch.float64) + 1

    def k(a, b):
        return (a @ b / 4 + 1) ** 3

    within_x = np.mean([k(x[i], x[j]) for i in range(30) for j in range(30) if i != j])
    random = np.random.RandomState(2020)
    random.choice(30, 30, replace=False)
    y_subset = y[random.choice(40, 30, replace=False)]
    within_y = np.mean([k(y_subset[i], y_subset[j]) for i in range(30) for j in range(30) if i != j])
    across = np.mean([k(a, b) for a in x for b in y_subset])
    mean, std = kernel_distance(x, y, subsets=1, subset_size=30)
    assert mean == pytest.approx(within_x + within_y - 2 * across, rel=1e-10)
    assert std == 0


def test_kernel_distance_is_nothing_for_equal_distributions():
    same, other = torch.randn(3, 2000, 8).unbind()[:2]
    mean, std = kernel_distance(same, other, subsets=20, subset_size=500)
    assert abs(mean) < 3 * std
    assert kernel_distance(same, other + 1, subsets=20, subset_size=500)[0] > 10 * std


def test_kernel_distance_of_too_few():
    with pytest.raises(ValueError, match=r"subsets of 50 .* got 40 generated and 60 real"):
        kernel_distance(torch.randn(40, 2), torch.randn(60, 2), subset_size=50)


def test_precision_and_recall_of_a_tight_cluster():
    real = torch.randn(500, 4)
    precision, recall = precision_recall(0.05 * torch.randn(500, 4), real)
    assert precision > 0.99
    assert recall < 0.1
    precision, recall = precision_recall(torch.cat([real[:250], real[:250] + 100]), real)
    assert precision == 0.5
    assert recall > 0.5
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real + 100, real) == (0, 0)


def test_precision_and_recall_in_one_dimension():
    # Radius to the nearest other: real 0 and 1: 1; 10: 9. Generated 3: 1; 4: 1; 30: 26.
    real, generated = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[3.0], [4.0], [30.0]])
    precision, recall = precision_recall(generated, real, neighbours=1)
    assert precision == pytest.approx(2 / 3)  # 3 and 4 lie in [1, 19]
    assert recall == pytest.approx(1 / 3)  # 10 lies in [4, 56]


def test_blocks_of_precision_and_recall_do_not_matter(monkeypatch):
    generated, real = torch.randn(57, 6) + 0.5, torch.randn(41, 6)
    whole = precision_recall(generated, real)
    monkeypatch.setattr("consistency.evaluation.scores._BLOCK", 41 * 10)
    assert precision_recall(generated, real) == whole
    assert 0 < whole[0] < 1


def test_collapsed_samples_are_far():
    real = torch.randn(1000, 4)
    collapsed = real[:1].expand(1000, 4) + 1e-3 * torch.randn(1000, 4)
    far, near = (
        frechet_distance(FeatureMoments(4).add(x), FeatureMoments(4).add(real))
        for x in (collapsed, torch.randn(1000, 4))
    )
    assert far > 2
    assert near < 0.1
