"""One pass over samples, and scores whose names say what they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from consistency.evaluation.extractors import PREPROCESSING, Extractor, extract
from consistency.evaluation.references import Reference
from consistency.evaluation.scores import frechet_distance, kernel_distance, precision_recall
from consistency.evaluation.statistics import FeatureStatistics, add_over_ranks

log = logging.getLogger(__name__)

MIN_SAMPLES = 2048  # below, the covariance of Inception's features is singular
SUSPICIOUS = 0.05  # no sampler reaches this distance; a set compared with itself does
# What can be asked for -> the scores that it gives.
METRICS = {
    "fd": ("fd",),
    "kd": ("kd", "kd_std"),
    "is": ("is", "is_std"),
    "precision": ("precision",),
    "recall": ("recall",),
}
_NEED_FEATURES = {"kd", "precision", "recall"}


def needs_features(metrics: Sequence[str]) -> bool:
    """Whether these metrics need the features of the reference one by one."""
    return not _NEED_FEATURES.isdisjoint(metrics)


def metric_names(
    prefix: str, total: int, metrics: Sequence[str] = ("fd",), *, published: bool = True
) -> tuple[str, ...]:
    """Names of the scores that `measure` returns, in its order.

    Inception's say how many samples: `fid50k`, `kid50k`, `is50k`, `precision50k` for exactly 50,000, else
    `fid5k_proxy`, `fid2.048k_proxy`. A classifier's are `fd_classifier`, `kd_classifier`, ..., never fid.

    Args:
        prefix: Of the extractor: "fid" or "fd_classifier".
        total: Number of samples.
        metrics: Keys of `METRICS`.
        published: Whether Inception has the published weights; with others every count is a proxy.

    Raises:
        ValueError: for a metric that does not exist.
    """
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        raise ValueError(f"unknown metric {', '.join(unknown)}; evaluation.metrics knows {', '.join(METRICS)}")
    kinds = {"fd": "fid", "kd": "kid"} if prefix == "fid" else {}
    thousands = f"{total / 1000:.3f}".rstrip("0").rstrip(".")
    suffix = (
        prefix.removeprefix("fd")
        if prefix != "fid"
        else f"{thousands}k" + ("" if total == 50_000 and published else "_proxy")
    )
    names = []
    for score in (score for metric in METRICS if metric in metrics for score in METRICS[metric]):
        kind, _, std = score.partition("_")
        names.append(f"{kinds.get(kind, kind)}{suffix}" + (f"_{std}" if std else ""))
    return tuple(names)


def names_of(extractor: Extractor, total: int, metrics: Sequence[str]) -> tuple[str, ...]:
    """`metric_names` of an extractor."""
    return metric_names(extractor.prefix, total, metrics, published=getattr(extractor, "published", True))


def batches_of_rank(total: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Tensor]:
    """Indices [B] of the samples that a rank draws: every world_size-th of the batches that one process would draw.

    Whole batches, so that any number of ranks draws the same images to the last bit.
    """
    yield from torch.arange(total).split(batch_size)[rank::world_size]


def describe(extractor: Extractor, reference: Reference | None, total: int) -> dict[str, Any]:
    """What has to stand beside a score: numbers and strings for a log or a JSON file."""
    about: dict[str, Any] = {"num_samples": total, "extractor": extractor.name, "extractor_digest": extractor.digest}
    if reference is not None:
        about |= {
            "reference": reference.id,
            "reference_digest": reference.digest,
            "reference_count": reference.count,
        }
    return about | {"preprocessing": PREPROCESSING}


def check(
    extractor: Extractor,
    reference: Reference | None,
    metrics: Sequence[str],
    *,
    total: int,
    allow_few: bool = False,
    kid_subset_size: int = 1000,
) -> None:
    """Refuse what `measure` cannot measure, before anything is sampled.

    Raises:
        ValueError: unknown metrics, too few samples, or a reference that is missing, another extractor's, or has no
            features where they are needed.
    """
    names_of(extractor, total, metrics)
    if total < MIN_SAMPLES:
        if not allow_few:
            raise ValueError(
                f"{total} samples are too few for scores that mean something, {MIN_SAMPLES} is the least; raise "
                "evaluation.num_samples, or set evaluation.allow_few=true"
            )
        _warn_of_few(total)
    if set(metrics) <= {"is"}:
        return
    if reference is None:
        raise ValueError(f"evaluation.metrics={list(metrics)} needs a reference; name one, or ask for [is] alone")
    if reference.extractor != extractor.name or reference.extractor_digest not in (None, extractor.digest):
        raise ValueError(
            f"the reference {reference.id} was made by {reference.extractor} {reference.extractor_digest}, the samples "
            f"would be measured by {extractor.name} {extractor.digest}; compute the reference anew"
        )
    if needs_features(metrics) and reference.features is None:
        raise ValueError(
            f"evaluation.metrics={list(metrics)} needs the features of the reference {reference.id}, which has moments "
            "only; keep them (keep_features=True), name a reference with images, or ask for [fd, is]"
        )
    if "kd" in metrics and min(total, len(reference.features)) < kid_subset_size:  # type: ignore[arg-type]
        least = min(total, len(reference.features))  # type: ignore[arg-type]
        raise ValueError(
            f"kd takes subsets of {kid_subset_size}, there are {least} images; set evaluation.kid_subset_size={least} "
            "or less, or leave kd out of evaluation.metrics"
        )


@cache
def _warn_of_few(total: int) -> None:
    """Once for each count."""
    log.warning("scores of %d samples are biased and noisy: compare them with equal counts only", total)


def measure(
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    total: int,
    extractor: Extractor,
    reference: Reference | None,
    metrics: Sequence[str] = ("fd",),
    allow_few: bool = False,
    kid_subset_size: int = 1000,
    expect_equal: bool = False,
) -> dict[str, float]:
    """Scores of samples, named by `metric_names`. All ranks call it, each with its samples, and get the same numbers.

    Args:
        batches: (uint8 images [B, C, H, W], indices int64 [B]): each index in [0, total) once over all ranks.
        total: Samples over all ranks.
        extractor: On the device that it shall run on.
        reference: What to compare with; None for the Inception Score alone.
        metrics: Keys of `METRICS`.
        allow_few: Measure fewer than 2,048 samples.
        kid_subset_size: See `kernel_distance`.
        expect_equal: The samples are the reference's images: a distance of 0 is no reason to warn.

    Raises:
        ValueError: see `check`; and if not exactly `total` distinct samples came.
    """
    check(extractor, reference, metrics, total=total, allow_few=allow_few, kid_subset_size=kid_subset_size)
    device = torch.device("cpu") if extractor.device.type == "mps" else extractor.device
    num_logits = extractor.num_logits if "is" in metrics else 0
    keep = needs_features(metrics)
    statistics = FeatureStatistics(extractor.dim, num_logits, total=total, keep_features=keep, device=device)
    for images, indices in batches:
        statistics.add(*extract(extractor, images), indices)
    statistics.all_reduce()

    def scores() -> list[float]:
        return _scores(statistics, reference, metrics, kid_subset_size, device)

    names = names_of(extractor, total, metrics)
    result = dict(zip(names, _on_first_rank(scores, len(names)), strict=True))
    if "fd" in metrics and result[names[0]] < SUSPICIOUS and not expect_equal:
        log.warning("%s = %.3g is suspiciously small: are these samples generated?", names[0], result[names[0]])
    return result


def _scores(
    statistics: FeatureStatistics,
    reference: Reference | None,
    metrics: Sequence[str],
    kid_subset_size: int,
    device: torch.device,
) -> list[float]:
    """In the order of `METRICS`."""
    scores: list[float] = []
    if "fd" in metrics:
        assert reference is not None
        scores.append(frechet_distance(statistics.moments, reference.moments))
    if needs_features(metrics):
        assert reference is not None
        assert reference.features is not None
        assert statistics.features is not None
        generated, real = statistics.features.to(device), reference.features.to(device)
    if "kd" in metrics:
        scores += kernel_distance(generated, real, subset_size=kid_subset_size)
    if "is" in metrics:
        scores += statistics.inception_score()
    if not {"precision", "recall"}.isdisjoint(metrics):
        both = dict(zip(("precision", "recall"), precision_recall(generated, real), strict=True))
        scores += [both[metric] for metric in both if metric in metrics]
    return scores


def _on_first_rank(compute: Callable[[], list[float]], length: int) -> list[float]:
    """Numbers that the first rank computes and all get; a failure there ends the others too, instead of a hang."""
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    numbers = torch.zeros(length + 1, dtype=torch.float64)  # the last one says whether it went well
    try:
        if first:
            numbers = torch.tensor([*compute(), 1.0], dtype=torch.float64)
    finally:
        add_over_ranks(numbers)
    if numbers[-1] != 1:
        raise RuntimeError("the first rank could not compute the scores; its log says why")
    return numbers[:-1].tolist()
