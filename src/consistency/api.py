"""`load` and `Model`: a trained model in a notebook. Sampling and editing, in one or a few evaluations.

from consistency import load

model = load("outputs/digits_ict")
images = model.sample(16, steps=2, seed=0)
filled = model.inpaint(images, mask)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from consistency.checkpoints.native import load_model
from consistency.models.denoiser import Denoiser
from consistency.models.register import import_modules
from consistency.ops import add_noise, from_uint8, image_seeds, randn_of_seeds, to_uint8
from consistency.sampling import wrappers
from consistency.sampling.images import labels_of_seed
from consistency.sampling.operators import enlarge, project_grey, project_means, project_pixels, slerp
from consistency.sampling.pipeline import Labels, SamplingPipeline, ViewOf

TWO_STEP = 0.821  # iCT's second level on CIFAR-10 (App. B)
STROKE, STROKE_RATIO = 5.38, 2.24 / 5.38  # the two levels of CM, App. D, for 256 x 256 pixels


def load(source: str | Path, weights: str | None = None, device: str = "auto", *, imports: Sequence[str] = ()) -> Model:
    """A trained model, ready to draw and to edit.

    Args:
        source: A run directory, a model folder, or a `.ckpt` file of a run.
        weights: `raw` or an average such as `ema0.999`; None for what the run exported.
        device: auto, cpu, cuda, cuda:1 or mps.
        imports: Modules of your own that register the network or parametrization of this model.

    Raises:
        ValueError: if there is no model at `source`, or not these weights, or no such device.
    """
    import_modules(imports)
    return Model(*load_model(source, weights), device=device)


class Model(SamplingPipeline):
    """A consistency model or a diffusion model (EDM, flow matching) behind one interface.

    Images go in and come out as uint8 [N, C, H, W] on the CPU; a single image may be [C, H, W], or of PIL. All methods
    share the keywords

        steps: network evaluations of a consistency model, steps of Heun's method of a diffusion model.
        levels: explicit decreasing noise levels in place of `steps`, one a step.
        seed: image i is a function of (seed, i), its label and what is known of it.
        labels: one for all images or a list, of class-conditional models; -1 is no label. None: random by seed where
            images are drawn. Where they are edited, no label if the model knows how to do without, else the label under
            which the model explains the image best.
        guidance: weight of classifier-free guidance; 1 for none.

    Args:
        denoiser: The model.
        info: What it was saved with.
        device: auto, cpu, cuda, cuda:1 or mps.
        batch_size: Images at a time.
    """

    def __init__(
        self, denoiser: Denoiser, info: dict[str, Any] | None = None, *, device: str = "auto", batch_size: int = 256
    ) -> None:
        self.info = dict(info or {})
        super().__init__(denoiser, device=device, batch_size=batch_size)

    def sample(
        self,
        num_images: int = 1,
        *,
        steps: int | None = None,
        levels: Sequence[float] | None = None,
        seed: int = 0,
        labels: Labels = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """New images; by default 1 step of a consistency model (2 are at sigma_max and 0.821) or 18 of the others."""
        given = self._given(labels, num_images)
        given = labels_of_seed(seed, range(num_images), self.num_classes) if given is None else given
        return self._run(num_images, self._sample_levels(steps, levels), seed=seed, labels=given, guidance=guidance)

    def inpaint(self, images: Any, mask: Any, **keywords: Any) -> Tensor:
        """Fill the pixels where `mask` is 0; those where it is 1 come back as they were (CM, Alg. 4).

        Args:
            images: uint8 [N, C, H, W]; hidden pixels may hold anything.
            mask: True or above 0.5 = known; [H, W] or [N, 1, H, W].
            **keywords: steps (39 of a consistency model, the paper's; 18 of a diffusion model), levels, seed, labels,
                guidance.
        """
        known = self.images(images)
        if isinstance(mask, str):
            raise ValueError(f"mask is {mask!r}; it must hold pixels, see consistency.sampling.operators.named_mask")
        mask = (mask.cpu() if isinstance(mask, Tensor) else torch.as_tensor(np.asarray(mask))) > 0.5
        count, _, height, width = known.shape
        if tuple(mask.shape) not in ((height, width), (1, 1, height, width), (count, 1, height, width)):
            allowed = f"[{height}, {width}] or [{count}, 1, {height}, {width}]"
            raise ValueError(f"the mask is {list(mask.shape)}; it must be {allowed}")
        mask = mask.expand(count, 1, height, width)
        floats = from_uint8(known) * mask  # what is hidden begins as grey; at sigma_max it drowns anyway
        return self._edit(floats, lambda rows: project_pixels(self._on(floats[rows]), mask[rows]), **keywords)

    def colorize(self, images: Any, **keywords: Any) -> Tensor:
        """Colours for the grey of `images`, uint8 [N, 3 or 1, H, W]; their luma is kept. Keywords as in `inpaint`."""
        if self.image_shape[0] != 3:
            raise ValueError("colorization needs a model of colour images, this one draws grey ones")
        floats = from_uint8(self.images(images, channels=(1, 3))).expand(-1, 3, -1, -1)
        grey = project_grey(floats)(torch.zeros_like(floats))
        return self._edit(grey, lambda rows: project_grey(self._on(floats[rows])), **keywords)

    def superresolve(self, images: Any, factor: int = 2, **keywords: Any) -> Tensor:
        """Enlarge uint8 [N, C, H / factor, W / factor]; the mean of each patch is kept. Keywords as in `inpaint`."""
        self.check_factor(factor)
        small = from_uint8(self.images(images, size=self.image_shape[1] // factor))
        return self._edit(enlarge(small, factor), lambda rows: project_means(self._on(small[rows]), factor), **keywords)

    def check_factor(self, factor: Any) -> None:
        """Refuse a factor of `superresolve` that does not divide the image size."""
        size = self.image_shape[1]
        if not (type(factor) is int and factor > 1 and size % factor == 0):
            divisors = [number for number in range(2, size + 1) if size % number == 0]
            raise ValueError(f"factor is {factor}; it must divide the model's {size} pixels: one of {divisors}")

    def stroke(self, images: Any, sigma: float | None = None, **keywords: Any) -> Tensor:
        """An image after a painting: noise of level `sigma` is added and taken away (SDEdit, Meng et al. 2022).

        Args:
            images: uint8 [N, C, H, W].
            sigma: Higher is freer. None: 5.38 for 256 x 256 pixels (CM, App. D), in proportion for other sizes, because
                the same noise hides more of a smaller image.
            **keywords: As in `inpaint`; the default steps are 2 of a consistency model, as in the paper.
        """
        painted = from_uint8(self.images(images))
        return self._edit(painted, None, **self._stroke_levels(sigma, **keywords))

    def translate(self, images: Any, labels: Labels, sigma: float | None = None, **keywords: Any) -> Tensor:
        """`images` as if they had these labels: `stroke` with other labels than their own."""
        if labels is None:
            raise ValueError("translation needs labels, to translate to")
        return self.stroke(images, sigma, labels=labels, **keywords)

    def denoise(
        self, images: Any, sigma: float, *, seed: int = 0, labels: Labels = None, guidance: float = 1.0
    ) -> Tensor:
        """The clean images behind noise of level `sigma`, in one evaluation.

        Args:
            images: Clean uint8 images, to which noise is added; or floats [N, C, H, W] that are noisy already.
            sigma: Noise level, in units of [-1, 1].
            seed: Of the noise.
            labels: As in the class docstring.
            guidance: As in the class docstring.
        """
        levels, noisy = self.levels(None, [sigma]), self.noisy(images, sigma, seed=seed)
        is_clean = not (isinstance(images, Tensor) and images.is_floating_point())
        if labels is None and self.num_classes and not is_clean and not (self.can_guide and guidance == 1):
            raise ValueError("noisy images of a class-conditional model need labels")  # guessed from clean ones only
        clean = from_uint8(self.images(images)) if is_clean else noisy
        given = self._edit_labels(clean, labels, None, seed, guidance)
        none = torch.zeros_like(noisy)  # the noise is in the images
        return self._run(len(noisy), levels, seed=seed, labels=given, guidance=guidance, base=noisy, noise=none)

    def noisy(self, images: Any, sigma: float, *, seed: int = 0) -> Tensor:
        """x + sigma z, float32 [N, C, H, W], as `denoise` makes it of uint8 images; floats are returned as they are."""
        if isinstance(images, Tensor) and images.is_floating_point():
            if images.shape[1:] != self.image_shape:
                raise ValueError(f"noisy images are {list(images.shape)}, the model's are [N, *{self.image_shape}]")
            return images.float()
        clean = from_uint8(self.images(images))
        return add_noise(clean, randn_of_seeds(image_seeds(seed, range(len(clean))), self.image_shape)(clean), sigma)

    def interpolate(
        self,
        start: int,
        end: int,
        num_images: int = 8,
        *,
        places: Sequence[float] | None = None,
        steps: int | None = None,
        levels: Sequence[float] | None = None,
        labels: Labels = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """Images between image 0 of two seeds: their noise is interpolated on the sphere (CM, App. D).

        Args:
            start: Seed of the first image.
            end: Seed of the last.
            num_images: Images, evenly spread, both ends included.
            places: Positions in [0, 1] in place of `num_images`.
            steps: As in `sample`.
            levels: As in `sample`.
            labels: One for all; None for that of the first image. The noise between steps is one for all images.
            guidance: As in the class docstring.
        """
        if type(start) is not int or type(end) is not int:
            raise ValueError("interpolate takes two seeds; `morph` goes from one image to another")
        at = torch.linspace(0, 1, num_images) if places is None else torch.tensor([float(place) for place in places])
        given = self._given(labels, len(at))
        if given is None and self.num_classes:
            given = labels_of_seed(start, [0], self.num_classes).expand(len(at))  # type: ignore[union-attr]
        ends = [randn_of_seeds(image_seeds(seed, [0]), self.image_shape)(torch.empty(1)) for seed in (start, end)]
        noise = slerp(ends[0][0].double(), ends[1][0].double(), at)
        return self._run(
            len(at),
            self._sample_levels(steps, levels),
            seed=start,
            labels=given,
            guidance=guidance,
            noise=noise,
            together=True,
        )

    def morph(self, images: Any, num_images: int = 8, *, sigma: float | None = None, **keywords: Any) -> Tensor:
        """Images between two given ones, both ends included; keywords as in `stroke`.

        A diffusion model encodes them exactly: its ODE is followed up to the noise of each, which is interpolated on
        the sphere. A consistency model has no way back: the two are blended, and the blend gets noise of level `sigma`.

        Args:
            images: Two, uint8 [2, C, H, W].
            num_images: Images in the strip.
            sigma: Of consistency models; None as in `stroke`.
            **keywords: steps, levels, seed, labels (one for all, or one for each end), guidance.
        """
        pair = self.images(images)
        if len(pair) != 2:
            raise ValueError(f"interpolation takes two images, got {len(pair)}")
        at = torch.linspace(0, 1, num_images)
        seed, guidance = keywords.pop("seed", 0), keywords.pop("guidance", 1.0)
        labels = self._edit_labels(from_uint8(pair), keywords.pop("labels", None), None, seed, guidance)
        near = None if labels is None else labels[(at > 0.5).long()]
        if self.is_consistency:
            first, last = from_uint8(pair)
            blend = torch.lerp(first, last, at[:, None, None, None])
            keywords = self._stroke_levels(sigma, **keywords)
            return self._edit(blend, None, labels=near, seed=seed, guidance=guidance, together=True, **keywords)
        levels = self.levels(**keywords)
        noise = self._encode(pair, levels, labels, guidance) / levels[0]
        between = slerp(noise[0], noise[1], at)
        return self._run(num_images, levels, seed=seed, labels=near, guidance=guidance, noise=between)

    def anagram(
        self, label: int, turned_label: int, num_images: int = 1, *, turn: str = "flip", **keywords: Any
    ) -> Tensor:
        """Images that are `label` upright and `turned_label` upside down (Geng et al. 2024, visual anagrams).

        Args:
            label: Of the image as it stands.
            turned_label: Of the turned image.
            num_images: Images.
            turn: flip (upside down), mirror (left to right) or rotate (by 180 degrees).
            **keywords: As in `inpaint`, without labels.
        """
        if turn not in wrappers.TURNS:
            raise ValueError(f"turn is {turn}; allowed: {', '.join(wrappers.TURNS)}")
        other = self._needed(turned_label, num_images)
        return self._compose(
            label,
            num_images,
            lambda model, rows: wrappers.anagram(model, self._on(other[rows]), wrappers.TURNS[turn]),
            **keywords,
        )

    def hybrid(
        self, far_label: int, near_label: int, num_images: int = 1, *, blur: float = 1.0, **keywords: Any
    ) -> Tensor:
        """Images that are `far_label` from afar and `near_label` from near (Oliva et al. 2006, by two estimates).

        Args:
            far_label: Of the low frequencies.
            near_label: Of the high frequencies.
            num_images: Images.
            blur: Standard deviation in pixels of the Gaussian that parts the frequencies.
            **keywords: As in `inpaint`, without labels.
        """
        if not blur > 0:
            raise ValueError(f"blur must be positive, got {blur}")
        near = self._needed(near_label, num_images)
        return self._compose(
            far_label, num_images, lambda model, rows: wrappers.hybrid(model, self._on(near[rows]), blur), **keywords
        )

    def images(self, images: Any, *, size: int | None = None, channels: Sequence[int] | None = None) -> Tensor:
        """uint8 [N, C, H, W] of what was given, after a look at its kind and shape.

        Raises:
            ValueError: if it is not what the model draws.
        """
        if hasattr(images, "getbands"):  # PIL
            array = np.array(images.convert("L" if self.image_shape[0] == 1 else "RGB"))
            images = array[..., None].transpose(2, 0, 1) if array.ndim == 2 else array.transpose(2, 0, 1)
        given = torch.as_tensor(images)
        given = given[None] if given.ndim == 3 else given
        side = size or self.image_shape[1]
        allowed = tuple(channels or self.image_shape[:1])
        if given.dtype != torch.uint8 or given.ndim != 4 or len(given) == 0 or given.shape[1] not in allowed:
            kinds = " or ".join(map(str, allowed))
            got = f"{given.dtype} {list(given.shape)}"
            raise ValueError(f"images are {got}; expected uint8 [N, {kinds}, {side}, {side}]")
        if given.shape[-2:] != (side, side):
            height, width = given.shape[-2:]
            raise ValueError(f"images are {height} x {width} pixels, here they must be {side} x {side}")
        return given.cpu()

    def _stroke_levels(
        self, sigma: float | None, steps: int | None = None, levels: Sequence[float] | None = None, **keywords: Any
    ) -> dict[str, Any]:
        """Keywords with the level where the noise begins; CM's two levels for a consistency model without others."""
        if sigma is not None and levels is not None:
            raise ValueError(
                f"give sigma ({sigma:g}) or levels ({list(levels)}), not both: noise begins at the first level"
            )
        start = STROKE * self.image_shape[1] / 256 if sigma is None else float(sigma)
        if self.is_consistency and steps in (None, 2) and levels is None:
            first = self.levels(1, start=start)[0]
            steps, levels = None, [first, first * STROKE_RATIO]
            levels = [level for level in levels if level > self.denoiser.sigma_min]
        return {**keywords, "start": start, "steps": steps, "levels": levels}

    def _sample_levels(self, steps: int | None, levels: Sequence[float] | None) -> list[float]:
        """Levels of new images: a consistency model's first two are the published ones, not the grid's."""
        if levels is None and self.is_consistency and steps in (None, 1, 2):
            steps, levels = None, [self.denoiser.sigma_max, TWO_STEP][: steps or 1]
        return self.levels(steps, levels)

    def _compose(self, label: int, num_images: int, view: ViewOf, **keywords: Any) -> Tensor:
        """New images of a view that has labels of its own."""
        seed, guidance = keywords.pop("seed", 0), keywords.pop("guidance", 1.0)
        labels = self._needed(label, num_images)
        return self._run(num_images, self.levels(**keywords), seed=seed, labels=labels, guidance=guidance, view=view)


def shrink(images: Tensor, factor: int) -> Tensor:
    """uint8 [N, C, H, W] -> uint8 [N, C, H / factor, W / factor]: means of patches, what `superresolve` takes."""
    return to_uint8(F.avg_pool2d(from_uint8(images), factor))
