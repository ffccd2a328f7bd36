"""Distances between two sets of features: Frechet, kernel (KID), precision and recall. All sums in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from consistency.evaluation.statistics import SEED

_BLOCK = 1 << 25  # elements of a block of distances: 256 MB


class HasMoments(Protocol):
    """Anything with a mean [dim] and a covariance [dim, dim] in float64."""

    @property
    def mean(self) -> Tensor: ...  # noqa: D102
    @property
    def covariance(self) -> Tensor: ...  # noqa: D102


def frechet_distance(a: HasMoments, b: HasMoments) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)) (Heusel et al. 2017).

    With cov = L L^T, cov_a cov_b has the eigenvalues of the symmetric P P^T, P = L_a^T L_b: no complex numbers, no NaN
    for few samples, as the usual `sqrtm` of the product returns.
    """
    factor_a, factor_b = _factor(a.covariance), _factor(b.covariance)
    product = factor_a.T @ factor_b
    if product.shape == a.covariance.shape:
        trace_root = torch.linalg.eigvalsh(product @ product.T).clamp(min=0).sqrt().sum()
    else:
        # Roots of eigenvalues that are zero but for rounding would add 1e-8 of the largest each.
        trace_root = torch.linalg.svdvals(product).sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return max(((a.mean - b.mean).square().sum() + traces - 2 * trace_root).item(), 0.0)


def kernel_distance(
    generated: Tensor, real: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = SEED
) -> tuple[float, float]:
    """Unbiased squared MMD with the kernel (x.y / dim + 1)^3 (KID, Binkowski et al. 2018): mean and std over subsets.

    The subsets are torch-fidelity's. It sums in float32 and therefore agrees to about 1e-7 of the kernel, not of the
    distance.

    Args:
        generated: Features [N, dim]; the sums are made where they lie.
        real: Features [M, dim].
        subsets: How many pairs of subsets.
        subset_size: Samples of a subset, without repetition.
        seed: Of the subsets.
    """
    if min(len(generated), len(real)) < subset_size:
        raise ValueError(
            f"a kernel distance with subsets of {subset_size} needs as many samples on both sides, got "
            f"{len(generated)} generated and {len(real)} real ones; take more, or smaller subsets"
        )
    random = np.random.RandomState(seed)  # the stream that others use
    values = []
    for _ in range(subsets):
        x = generated[random.choice(len(generated), subset_size, replace=False)].double()
        y = real[random.choice(len(real), subset_size, replace=False)].double()
        values.append(_squared_mmd(x, y))
    result = torch.stack(values)
    return result.mean().item(), result.std(correction=0).item()


def precision_recall(generated: Tensor, real: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Share of generated samples inside the real manifold, and the reverse (Kynkaanniemi et al. 2019).

    A manifold is the union of balls around its samples that reach to the k-th nearest other one. Distances are
    made in blocks of 256 MB, about three at a time; beside them lies one of the sets in float64.

    Args:
        generated: Features [N, dim]; distances are computed where they lie.
        real: Features [M, dim].
        neighbours: k.

    Returns:
        Precision (quality) and recall (coverage).
    """
    if min(len(generated), len(real)) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more samples, got {len(generated)} and {len(real)}")
    radius_generated, radius_real = (_squared_radii(x, neighbours) for x in (generated, real))
    precise = 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, squared in _squared_distances(generated, real):
        precise += int((squared <= radius_real).any(dim=1).sum())
        recalled |= (squared <= radius_generated[rows, None]).any(dim=0)
    return precise / len(generated), int(recalled.sum()) / len(real)


def _factor(covariance: Tensor) -> Tensor:
    """L [dim, rank] with L L^T = covariance: Cholesky's, or by eigenvalues where the covariance is singular.

    It is where there are fewer samples than dimensions, or features that are always 0.
    """
    noise = len(covariance) * torch.finfo(covariance.dtype).eps
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed and factor.diagonal().min().square() > noise * covariance.diagonal().max():
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    real = values > noise * values[-1]
    return vectors[:, real] * values[real].sqrt()


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Scalar; a sample's kernel with itself does not count within a set, pairs across the sets all do."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n = len(x)
    within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y)))
    return within / (n * (n - 1)) - 2 * kernel(x, y).mean()


def _squared_radii(x: Tensor, neighbours: int) -> Tensor:
    """Squared distance of each row of x [N, dim] to its k-th nearest other row, [N]."""
    # The nearest row is the row itself.
    return torch.cat([squared.kthvalue(neighbours + 1).values for _, squared in _squared_distances(x, x)])


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a and their squared distances to all rows of b, [rows, len(b)], block by block."""
    b = b.double()
    norms = b.square().sum(dim=1)
    size = max(1, _BLOCK // len(b))
    for start in range(0, len(a), size):
        rows = slice(start, min(start + size, len(a)))
        block = a[rows].double()
        squared = torch.addmm(norms, block, b.T, alpha=-2).add_(block.square().sum(dim=1, keepdim=True))
        yield rows, squared.clamp_(min=0)
