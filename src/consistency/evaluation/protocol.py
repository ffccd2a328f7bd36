"""A protocol of measurement: the same object in training, after it, and in searches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency.evaluation.extractors import Extractor, Inception, classifier_extractor, find_inception
from consistency.evaluation.measure import (
    batches_of_rank,
    check,
    describe,
    measure,
    metric_names,
    names_of,
    needs_features,
)
from consistency.evaluation.references import Reference, compute_reference
from consistency.evaluation.residual import ResidualRecipe
from consistency.io.tensors import digest_of
from consistency.models.denoiser import Denoiser
from consistency.sampling.images import counted, labels_of_seed, sample_batches
from consistency.sampling.samplers import described


def inception(
    data: Any,
    *,
    weights: str | Path | None = None,
    cache_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Extractor:
    """Inception, whatever the data; see `find_inception` for where its weights come from."""
    del data, cache_dir, device
    return Inception(find_inception(weights))


def classifier(
    data: Any,
    *,
    weights: str | Path | None = None,
    cache_dir: str | Path,
    device: torch.device | str = "cpu",
    network: ResidualRecipe | None = None,
) -> Extractor:
    """A classifier of a data set: the small one, or a residual one.

    Args:
        data: Data module.
        weights: None; for Inception alone.
        cache_dir: Where classifiers are kept.
        device: Where a residual one is trained; the small one always on the CPU, so that its bits are the same.
        network: The residual one and how it is trained; None for the small one.

    Raises:
        ValueError: if there is no data set, or it does not fit in memory; if weights are named.
    """
    if weights is not None:
        raise ValueError(f"evaluation.weights={weights} is for Inception; a classifier is trained on the data set")
    if data is None:
        raise ValueError(
            "a classifier needs the data set, but there is none; use evaluation=full or proxy (Inception), or name "
            "data=... (in training: callbacks.quality=null for no scores)"
        )
    images, labels = data.in_memory()
    return classifier_extractor(
        images, labels, cache_dir, recipe=network, device=device if network is not None else "cpu"
    )


@dataclass(frozen=True)
class Evaluation:
    """What is measured, with what, on how many samples.

    Args:
        extractor: `(data module or None, weights=, cache_dir=, device=) -> Extractor`: `inception` or `classifier`.
        num_samples: Samples of one measurement; 50,000 is what papers report.
        cache_dir: Of references and classifiers.
        weights: File of Inception's weights; None for torch's cache, or a download.
        batch_size: Samples at a time.
        metrics: fd, kd, is, precision, recall.
        allow_few: Measure fewer than 2,048 samples.
        kid_subset_size: See `kernel_distance`.
    """

    extractor: Callable[..., Extractor]
    num_samples: int
    cache_dir: str
    weights: str | None = None
    batch_size: int = 250
    metrics: Sequence[str] = ("fd",)
    allow_few: bool = False
    kid_subset_size: int = 1000

    def __post_init__(self) -> None:
        for option in ("num_samples", "batch_size"):
            value = getattr(self, option)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"evaluation.{option} must be an integer, at least 1, got {value}")
        metric_names("fid", self.num_samples, self.metrics)  # refuses metrics that do not exist

    def prepare(self, data: Any, device: torch.device | str = "cpu") -> tuple[Extractor, Reference]:
        """The extractor (on the CPU) and the reference of a data module, checked: what is missing is said now.

        Args:
            data: An `ImageDataModule` after `setup`.
            device: Where the features of the reference are computed, and a residual classifier is trained, if they are
                not in the cache.
        """
        identity = data.identity()
        extractor = self.make_extractor(data, device)
        extractor.to(device)
        reference = compute_reference(
            data.images(self.batch_size),
            id=identity["id"],
            count=identity["images"],
            extractor=extractor,
            keep_features=self.keeps_features,
            cache_dir=self.cache_dir,
            content_digest=identity["sha256"] or digest_of(data.in_memory()[0]),
        )
        extractor.cpu()
        self.check(extractor, reference)
        return extractor, reference

    def make_extractor(self, data: Any, device: torch.device | str = "cpu") -> Extractor:
        """The extractor, on the CPU; `data` is a data module or None, `device` where it is trained if it must be."""
        return self.extractor(data, weights=self.weights, cache_dir=self.cache_dir, device=device)

    def check(self, extractor: Extractor, reference: Reference, total: int | None = None) -> None:
        """Refuse what cannot be measured, before anything is sampled; see `measure.check`."""
        check(
            extractor,
            reference,
            self.metrics,
            total=self.num_samples if total is None else total,
            allow_few=self.allow_few,
            kid_subset_size=self.kid_subset_size,
        )

    def measure(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        extractor: Extractor,
        reference: Reference,
        total: int | None = None,
    ) -> dict[str, float]:
        """Scores of (uint8 images, indices); see `measure.measure`."""
        return measure(
            batches,
            total=self.num_samples if total is None else total,
            extractor=extractor,
            reference=reference,
            metrics=self.metrics,
            allow_few=self.allow_few,
            kid_subset_size=self.kid_subset_size,
        )

    def measure_sampler(
        self,
        denoiser: Denoiser,
        sampler: Any,
        extractor: Extractor,
        reference: Reference,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        progress: Callable[[int], None] = lambda count: None,
    ) -> dict[str, Any]:
        """Scores of what a sampler draws from a model, and all that makes them comparable: one row of a table.

        All ranks call it and get the same scores. Rank r draws every world_size-th batch of the images that one process
        would draw; labels of conditional models are random by seed.

        Args:
            denoiser: In eval mode.
            sampler: A `ConsistencySampler` or `OdeSampler`.
            extractor: On the device that it shall run on.
            reference: See `prepare`.
            seed: Of the images.
            rank: Of this process.
            world_size: Number of processes.
            progress: Told the number of images of each batch.
        """
        taken = 0
        labels = labels_of_seed(seed, range(self.num_samples), denoiser.num_classes)
        parts = batches_of_rank(self.num_samples, self.batch_size, rank=rank, world_size=world_size)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal taken
            own = (part.tolist() for part in parts)
            for indices, images in sample_batches(denoiser, sampler, own, seed=seed, labels=labels):
                taken += 1
                progress(len(indices))
                yield images, torch.tensor(indices)

        with counted(denoiser) as evaluations:
            scores = self.measure(batches(), extractor, reference)
        nfe = evaluations() // max(taken, 1)
        own = sampler.levels(denoiser) if hasattr(sampler, "levels") else []  # a plain function says none
        levels = [float(f"{level:.6g}") for level in own]
        drawn_by = {"sampler": described(sampler), "levels": levels, "nfe": nfe, "seed": seed}
        return {**scores, **drawn_by, **self.about(extractor, reference)}

    @property
    def keeps_features(self) -> bool:
        """Whether a reference must hold features, not moments only."""
        return needs_features(self.metrics)

    def names(self, extractor: Extractor) -> tuple[str, ...]:
        """Names of the scores."""
        return names_of(extractor, self.num_samples, self.metrics)

    def about(self, extractor: Extractor, reference: Reference, total: int | None = None) -> dict[str, Any]:
        """What has to stand beside the scores."""
        return describe(extractor, reference, self.num_samples if total is None else total)
