"""Float64 sums over features that batches and ranks can add; nothing is kept that no score needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

SEED = 2020  # of the order of samples in the Inception Score and of KID's subsets: torch-fidelity's
_BLOCK = 1 << 26  # elements that ranks exchange at a time


@dataclass(frozen=True)
class Moments:
    """Mean [dim] and covariance [dim, dim] of feature vectors, float64."""

    mean: Tensor
    covariance: Tensor


class FeatureMoments:
    """Running mean and covariance of feature vectors, in float64: float32 sums drift by 50,000 samples.

    Args:
        dim: Length of a feature vector.
        device: Where the sums lie; it must know float64 (MPS does not).
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> FeatureMoments:
        """Add a batch of features [B, dim]; returns itself."""
        # Products of float32 numbers are exact in float64, so only the sums round.
        features = features.detach().to(self.total.device, torch.float64)
        self.count += len(features)
        self.total += features.sum(dim=0)
        self.outer.addmm_(features.T, features)
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


class FeatureStatistics:
    """What the scores need of `total` samples: moments, class probabilities of each split, and features if asked.

    A sample is known by its index in [0, total). Order, batches and ranks do not matter: each rank adds its share,
    then all call `all_reduce`.

    Args:
        dim: Length of a feature vector.
        num_logits: Length of the logits; 0 where nobody asks for the Inception Score.
        total: Samples over all ranks.
        keep_features: Keep the features for KID, precision and recall: 4 total dim bytes on each rank.
        splits: Parts of the Inception Score.
        device: Of the sums.
    """

    def __init__(
        self,
        dim: int,
        num_logits: int,
        *,
        total: int,
        keep_features: bool,
        splits: int = 10,
        device: torch.device | str = "cpu",
    ) -> None:
        self._sums = FeatureMoments(dim, device)
        self._seen = torch.zeros(total, dtype=torch.int32)
        self._features = torch.zeros(total, dim) if keep_features else None
        self._split_of = _splits(total, splits)
        self._probabilities = torch.zeros(splits, num_logits, dtype=torch.float64, device=device)
        self._negentropy = torch.zeros(splits, dtype=torch.float64, device=device)

    def add(self, features: Tensor, logits: Tensor, indices: Tensor) -> None:
        """Add samples.

        Args:
            features: [B, dim].
            logits: [B, num_logits]; not looked at where num_logits is 0.
            indices: [B] int64, position of each sample among all.
        """
        indices = indices.cpu()
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self._seen):
            raise ValueError(
                f"samples have indices in [0, {len(self._seen)}), got {int(indices.min())} to {int(indices.max())}"
            )
        self._sums.add(features)
        self._seen.index_add_(0, indices, torch.ones(len(indices), dtype=torch.int32))
        if self._features is not None:
            self._features[indices] = features.detach().float().cpu()
        if self._probabilities.shape[1]:
            split = self._split_of[indices].to(self._negentropy.device)
            log_p = logits.detach().to(self._negentropy.device, torch.float64).log_softmax(dim=1)
            self._probabilities.index_add_(0, split, log_p.exp())
            self._negentropy.index_add_(0, split, (log_p.exp() * log_p).sum(dim=1))

    def all_reduce(self) -> None:
        """Add what all ranks have (nothing to add without torch.distributed) and check that all samples came once.

        Raises:
            ValueError: if the samples that came are not exactly `total` distinct ones.
        """
        sums = [self._sums.total, self._sums.outer, self._probabilities, self._negentropy, self._seen]
        if self._features is not None:
            sums.append(self._features)  # zero where other ranks have the sample, so nothing is rounded
        for tensor in sums:
            add_over_ranks(tensor)
        total, came, distinct = len(self._seen), int(self._seen.sum()), int((self._seen > 0).sum())
        if came != total or distinct != total:
            raise ValueError(f"{total} samples were announced, {came} came, {distinct} of them distinct")
        self._sums.count = total

    @property
    def moments(self) -> Moments:
        """Mean and covariance, on the CPU."""
        return Moments(self._sums.mean.cpu(), self._sums.covariance.cpu())

    @property
    def features(self) -> Tensor | None:
        """float32 [total, dim], in the order of the indices, on the CPU; None unless kept."""
        return self._features

    def inception_score(self) -> tuple[float, float]:
        """exp(E[KL(p(y|x) || p(y))]) (Salimans et al. 2016): mean and standard deviation over the splits."""
        counts = self._split_of.bincount(minlength=len(self._negentropy)).double()
        if not self._probabilities.shape[1] or counts.min() == 0:
            raise ValueError(f"an Inception Score of {len(counts)} splits needs logits and as many samples")
        marginal = self._probabilities.cpu() / counts[:, None]
        scores = (self._negentropy.cpu() / counts - torch.xlogy(marginal, marginal).sum(dim=1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()


def _splits(total: int, splits: int) -> Tensor:
    """Split of each sample, int64 [total]: contiguous parts of one fixed shuffle, torch-fidelity's."""
    order = np.random.RandomState(SEED).permutation(total)
    split_of = torch.empty(total, dtype=torch.int64)
    for split in range(splits):
        split_of[order[split * total // splits : (split + 1) * total // splits]] = split
    return split_of


def add_over_ranks(tensor: Tensor) -> None:
    """Sum a contiguous tensor over all ranks, in place; through the GPU where NCCL knows nothing else."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
    for part in tensor.view(-1).split(_BLOCK):
        moved = part.to(device)
        dist.all_reduce(moved)
        if moved is not part:
            part.copy_(moved)
