"""Finished images: image i of a seed is the same in every batch, on every device, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from consistency.models.denoiser import Denoiser
from consistency.ops import derive_seed, image_seeds, randn_of_seeds, send, to_uint8
from consistency.sampling.wrappers import DenoiserWrapper


@contextmanager
def counted(denoiser: Denoiser) -> Iterator[Callable[[], int]]:
    """Within the context, the function that it yields says how often the denoiser was evaluated."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = denoiser.register_forward_pre_hook(count)
    try:
        yield lambda: calls
    finally:
        handle.remove()


def recorded(denoiser: Any) -> tuple[DenoiserWrapper, list[Tensor]]:
    """The denoiser, and a list to which each evaluation adds its estimate of the images; uint8 [B, C, H, W], CPU."""
    estimates = list[Tensor]()

    def answer(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        estimate: Tensor = denoiser(x, sigma, labels)
        estimates.append(to_uint8(estimate).cpu())
        return estimate

    return DenoiserWrapper(denoiser, answer), estimates


@torch.no_grad()
def sample_images(
    denoiser: Denoiser,
    sampler: Callable[..., Tensor],
    indices: Sequence[int],
    *,
    seed: int,
    labels: Tensor | None = None,
) -> Tensor:
    """Images number `indices` of this seed; uint8 [B, C, H, W] on the denoiser's device.

    Args:
        denoiser: A model in eval mode.
        sampler: A `ConsistencySampler` or `OdeSampler`.
        indices: Which images; image i depends on (seed, i) and its label alone.
        seed: Of all images.
        labels: [B] int64, of conditional models.
    """
    device = next(denoiser.parameters()).device
    # EDM integrates in float64; MPS has none.
    state = torch.empty(0, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    randn_like = randn_of_seeds(image_seeds(seed, indices), denoiser.image_shape)
    labels = None if labels is None else send(labels, device)
    return to_uint8(sampler(denoiser, randn_like(state), labels, randn_like))


def sample_batches(
    denoiser: Denoiser,
    sampler: Callable[..., Tensor],
    batches: Iterable[Sequence[int]],
    *,
    seed: int,
    labels: Tensor | None = None,
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """(indices, uint8 [B, C, H, W] on the denoiser's device) of one batch after another.

    Args:
        denoiser: As in `sample_images`, as for `sampler` and `seed`.
        batches: Which images each batch has.
        labels: [N] int64 of all images, of conditional models.
    """
    for indices in batches:
        own = None if labels is None else labels[list(indices)]
        yield indices, sample_images(denoiser, sampler, indices, seed=seed, labels=own)


def labels_of(labels: Any, seed: int, num_images: int, num_classes: int) -> Tensor | None:
    """Labels as an option gives them: None for random ones by seed, else as `given_labels`; int64 [num_images]."""
    if labels is None:
        return labels_of_seed(seed, range(num_images), num_classes)
    return given_labels(labels, num_images, num_classes)


def labels_of_seed(seed: int, indices: Sequence[int], num_classes: int) -> Tensor | None:
    """Random labels, each a function of (seed, i); int64 [B], or None for an unconditional model (0 classes)."""
    if num_classes == 0:
        return None
    return torch.tensor([derive_seed("label", seed, int(index)) % num_classes for index in indices], dtype=torch.int64)


def given_labels(labels: Any, num_images: int, num_classes: int, *, none: bool = False) -> Tensor:
    """One label for all images, a list that is repeated, or `balanced` for i % num_classes; int64 [num_images].

    With `none`, -1 is allowed: no label.

    Raises:
        ValueError: if the model is unconditional, or a label is not one of its classes.
    """
    if num_classes == 0:
        raise ValueError(f"labels={labels} was given, but the model is unconditional; leave labels=null")
    if labels == "balanced":
        labels = range(num_classes)
    given = list(labels) if isinstance(labels, Sequence) and not isinstance(labels, str) else [labels]
    if not given or not all(type(label) is int and -none <= label < num_classes for label in given):
        what = ", or -1 for none" if none else " (-1, no label, takes model.label_dropout in training)"
        allowed = f"integers in [0, {num_classes - 1}]{what if none or -1 in given else ''}"
        raise ValueError(f"labels must be {allowed}, got {labels}")
    return torch.tensor([given[index % len(given)] for index in range(num_images)])
