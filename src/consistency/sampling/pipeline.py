"""From noise, or from a noisy image, down to images: what sampling and every zero-shot edit share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from consistency.models.denoiser import Denoiser
from consistency.models.parametrization import sampling_levels
from consistency.noise.grids import RHO, descending
from consistency.ops import add_noise, derive_seed, find_device, from_uint8, image_seeds, randn_of_seeds, to_uint8
from consistency.sampling import wrappers
from consistency.sampling.images import counted, given_labels
from consistency.sampling.labels import guess_labels
from consistency.sampling.samplers import sample_heun, sample_multistep
from consistency.sampling.steps import heun_step

Labels = int | Sequence[int] | Tensor | None
ViewOf = Callable[[Any, Tensor], Any]  # (denoiser, rows [b] of the images) -> a view of it
KnownOf = Callable[[Tensor], Callable[[Tensor], Tensor]]  # rows -> what puts back what is known of these images


class SamplingPipeline:
    """A model on a device, with the one way down its noise levels; `api.Model` names the tasks.

    Args:
        denoiser: The model.
        device: auto, cpu, cuda, cuda:1 or mps.
        batch_size: Images at a time.
    """

    def __init__(self, denoiser: Denoiser, *, device: str = "auto", batch_size: int = 256) -> None:
        self.device = find_device(device)
        self.denoiser = denoiser.eval().to(self.device)
        self.is_consistency = denoiser.kind != "diffusion"  # multistep sampling; else Heun's method on the ODE
        self.batch_size = batch_size
        self.last_levels: list[float] = []  # of the last call
        self.last_evaluations = 0  # of the network for each image, in the last call, all included
        self.last_labels: list[int] | None = None
        self._before = 0  # evaluations of an edit before it begins: guesses of labels, encoding

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.denoiser.image_shape

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 if unconditional."""
        return self.denoiser.num_classes

    @property
    def can_guide(self) -> bool:
        """Whether the model knows what an image without its label is (`model.label_dropout`)."""
        return self.num_classes > 0 and self.denoiser.label_dropout > 0

    def levels(
        self, steps: int | None = None, levels: Sequence[float] | None = None, *, start: float | None = None
    ) -> list[float]:
        """Noise levels of an edit, decreasing from `start` (None: sigma_max); CM's grid of N = 40, or `steps` levels.

        Raises:
            ValueError: if explicit levels do not decrease within the model's range.
        """
        low, high = self.denoiser.sigma_min, self.denoiser.sigma_max
        first = high if start is None else float(start)
        if levels is not None and steps is not None:
            raise ValueError(f"give steps ({steps}) or levels ({list(levels)}), not both")
        if levels is not None:
            given = [float(level) for level in levels]
            falls = len(given) > 0 and all(a > b for a, b in pairwise([*given, low])) and given[0] <= high
            if not falls:
                raise ValueError(f"levels must decrease from at most {high:g} to above {low:g}, got {given}")
            return given
        if not low < first <= high:
            raise ValueError(f"sigma must be above {low:g} and at most {high:g}, got {first:g}")
        if steps is not None and not (type(steps) is int and steps >= 1):
            raise ValueError(f"steps must be an integer, at least 1, got {steps}")
        if self.is_consistency:
            return descending(steps or 39, sigma_min=low, sigma_max=first).tolist()
        own = self.denoiser.parametrization
        return sampling_levels(own, steps or 18, sigma_min=low, sigma_max=first, rho=RHO)[:-1].tolist()

    def _edit(
        self,
        base: Tensor,
        known: KnownOf | None,
        *,
        steps: int | None = None,
        levels: Sequence[float] | None = None,
        start: float | None = None,
        seed: int = 0,
        labels: Labels = None,
        guidance: float = 1.0,
        together: bool = False,
    ) -> Tensor:
        """From `base` plus noise down the levels; `known` of some rows puts back what is known of them."""
        return self._run(
            len(base),
            self.levels(steps, levels, start=start),
            seed=seed,
            labels=self._edit_labels(base, labels, known, seed, guidance),
            guidance=guidance,
            base=base,
            known=known,
            together=together,
        )

    @torch.no_grad()
    def _run(
        self,
        num_images: int,
        levels: list[float],
        *,
        seed: int,
        labels: Tensor | None,
        guidance: float,
        base: Tensor | None = None,
        noise: Tensor | None = None,
        view: ViewOf | None = None,
        known: KnownOf | None = None,
        together: bool = False,
    ) -> Tensor:
        """Down the levels from base + levels[0] noise: multistep sampling, or Heun's method; uint8 on the CPU.

        `together` gives all images the noise of image 0, and `noise` replaces the first.
        """
        before, self._before = self._before, 0
        if num_images < 1:
            raise ValueError(f"the number of images must be at least 1, got {num_images}")
        if guidance != 1 and labels is not None and bool((labels < 0).any()):
            raise ValueError(f"guidance={guidance:g} needs labels, -1 is none; give labels, or guidance=1")
        guided = wrappers.guided(self.denoiser, guidance)
        kind = torch.float32 if self.device.type == "mps" else torch.float64  # as `sample_images`
        batches, parts = torch.arange(num_images).split(self.batch_size), []
        with counted(self.denoiser) as calls:
            for rows in batches:
                indices = [0] * len(rows) if together else rows.tolist()
                randn_like = randn_of_seeds(image_seeds(seed, indices), self.image_shape)
                first = randn_like(torch.empty(0, device=self.device, dtype=kind))
                if noise is not None:
                    first = noise[rows].to(first)
                x = levels[0] * first if base is None else add_noise(base[rows].to(first), first, levels[0])
                own = None if labels is None else labels[rows].to(self.device)
                denoiser = guided if view is None else view(guided, rows)
                denoiser = denoiser if known is None else wrappers.with_replacement(denoiser, known(rows))
                if self.is_consistency:
                    sigmas, low = torch.tensor(levels, dtype=torch.float64), self.denoiser.sigma_min
                    x = sample_multistep(denoiser, x, sigmas, labels=own, randn_like=randn_like, sigma_min=low)
                else:
                    sigmas = torch.tensor([*levels, 0.0], dtype=torch.float64)
                    x = sample_heun(denoiser, x, sigmas, labels=own, randn_like=randn_like)
                parts.append(to_uint8(x if known is None else wrappers.project_onto_constraint(x, known(rows))).cpu())
        self.last_levels, self.last_evaluations = levels, calls() // len(batches) + before
        self.last_labels = None if labels is None else labels.tolist()
        return torch.cat(parts)

    @torch.no_grad()
    def _encode(self, images: Tensor, levels: list[float], labels: Tensor | None, guidance: float) -> Tensor:
        """The noise behind images: the ODE followed upwards by Heun's method; float64 [N, C, H, W] at levels[0]."""
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        denoiser, x = wrappers.guided(self.denoiser, guidance), from_uint8(images).to(self.device, kind)
        own = None if labels is None else labels.to(self.device)
        with counted(self.denoiser) as calls:
            for low, high in pairwise(reversed(levels)):
                x = heun_step(denoiser, x, x.new_full((len(x),), low), x.new_full((len(x),), high), own)
        self._before += calls()
        return x.cpu()

    def _on(self, x: Tensor) -> Tensor:
        return x.to(self.device)

    def _given(self, labels: Labels, num_images: int) -> Tensor | None:
        """Labels as they were given, int64 [num_images]; -1 for none."""
        if labels is None:
            return None
        given = labels.tolist() if isinstance(labels, Tensor) else labels
        if isinstance(given, Sequence) and len(given) > num_images:
            raise ValueError(
                f"{len(given)} labels were given for {num_images} images; give as many, or fewer to repeat"
            )
        return given_labels(given, num_images, self.num_classes, none=self.can_guide)

    def _needed(self, label: int, num_images: int) -> Tensor:
        """One label of a task that is about labels."""
        if not self.num_classes:
            raise ValueError("this needs a class-conditional model, and this one is unconditional")
        return given_labels(label, num_images, self.num_classes)

    def _edit_labels(
        self, base: Tensor, labels: Labels, known: KnownOf | None, seed: int, guidance: float
    ) -> Tensor | None:
        """Labels as given; else none, if the model can do without; else, and for guidance, guessed."""
        self._before = 0
        if labels is not None or not self.num_classes:
            return self._given(labels, len(base))
        if self.can_guide and guidance == 1:
            return torch.full((len(base),), -1)
        parts = []
        for rows in torch.arange(len(base)).split(self.batch_size):
            own = self._on(base[rows])
            replace = (lambda x, own=own: own.to(x.dtype)) if known is None else known(rows)
            seeds = [derive_seed("guess", seed, row) for row in rows.tolist()]  # not the noise of the edit itself
            randn_like = randn_of_seeds(seeds, self.image_shape)
            with counted(self.denoiser) as calls:
                parts.append(guess_labels(self.denoiser, own, replace, randn_like).cpu())
            self._before = calls()
        return torch.cat(parts)
