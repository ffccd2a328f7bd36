"""Float64 sums of features that batches and ranks can add, and the Frechet distance between two of them."""

from __future__ import annotations

import torch
from torch import Tensor


class FeatureMoments:
    """Running mean and covariance of feature vectors, in float64: float32 sums drift by 50,000 samples.

    Args:
        dim: Length of a feature vector.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: Tensor) -> FeatureMoments:
        """Add a batch of features [B, dim]; returns itself."""
        features = features.detach().double().cpu()
        self.count += len(features)
        self.total += features.sum(dim=0)
        self.outer += features.T @ features
        return self

    @property
    def mean(self) -> Tensor:
        """[dim]."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased, [dim, dim]."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return (self.outer - torch.outer(self.total, self.total) / self.count) / (self.count - 1)


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)) (Heusel et al. 2017).

    The trace of the root is taken over the symmetric R cov_b R, R = cov_a^(1/2), with eigenvalues clipped at 0: the
    usual `sqrtm` of the product is not symmetric and returns complex or NaN values for few samples.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace_root = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace_root
    return max(distance.item(), 0.0)
