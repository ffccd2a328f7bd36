"""The shared preconditioned backbone: D(x; sigma) of EDM and f(x, sigma) of consistency models."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from consistency.models.unet import UNet
from consistency.noise.grids import SIGMA_MAX, SIGMA_MIN, check_range
from consistency.ops import append_dims


class Scalings(NamedTuple):
    """c_skip, c_out, c_in, each with the shape of sigma."""

    skip: Tensor
    out: Tensor
    input: Tensor


def consistency_scalings(sigma: Tensor, *, sigma_data: float = 0.5, boundary: float = SIGMA_MIN) -> Scalings:
    """Scalings with f(x, boundary) = x exactly (CM, App. C; iCT, Eq. 2).

    c_skip = sd^2 / ((sigma - boundary)^2 + sd^2), c_out = (sigma - boundary) sd / sqrt(sigma^2 + sd^2),
    c_in = 1 / sqrt(sigma^2 + sd^2); only the first two are shifted.
    """
    total = torch.sqrt(sigma**2 + sigma_data**2)
    shifted = sigma - boundary
    # c_skip with sd^2 divided out: `sd**2 / (0 + sd**2)` is 1 - 6e-8 for some sd in float32, 1 / (0 + 1) never.
    return Scalings(1 / ((shifted / sigma_data) ** 2 + 1), shifted * sigma_data / total, 1 / total)


def flow_scalings(sigma: Tensor, *, boundary: float = 0.0) -> Scalings:
    """Scalings with which F is the velocity of flow matching, a straight path from noise to data (Lipman et al. 2023).

    x_t = (1 - t) z + t x is (x + sigma z) / (1 + sigma) with sigma = (1 - t) / t: the network sees x_t, and
    D = x_t + (1 - t) F. A boundary above 0 shifts c_skip and c_out as in `consistency_scalings`.
    """
    shifted = sigma - boundary
    return Scalings(1 / (1 + shifted), shifted / (1 + sigma), 1 / (1 + sigma))


def edm_scalings(sigma: Tensor, *, sigma_data: float = 0.5) -> Scalings:
    """Scalings of EDM (Table 1): the same formula with its boundary at sigma = 0."""
    return consistency_scalings(sigma, sigma_data=sigma_data, boundary=0.0)


class Denoiser(nn.Module):
    """c_skip x + c_out F(c_in x, c_noise, labels), always fully preconditioned: [B, C, H, W] -> [B, C, H, W].

    Preconditioning runs in float32 whatever the precision of the network. c_noise = noise_scale * ln(sigma).

    Args:
        network: The raw network F.
        boundary: Level at which the model is the identity: 0 for EDM and ECT, `sigma_min` for CD, CT and iCT.
        sigma_data: Standard deviation of the data, in units of [-1, 1].
        sigma_min: Smallest noise level of the model.
        sigma_max: Largest noise level, where sampling starts.
        noise_scale: 0.25 (EDM, iCT) or 250 (OpenAI's published weights). 250 makes the embedding a thousand times as
            sensitive, which continuous or fine grids do not bear.
        scalings: `edm`, or `flow`, where the network predicts the velocity of a straight path (`flow_scalings`).
    """

    def __init__(
        self,
        network: UNet,
        *,
        boundary: float = SIGMA_MIN,
        sigma_data: float = 0.5,
        sigma_min: float = SIGMA_MIN,
        sigma_max: float = SIGMA_MAX,
        noise_scale: float = 0.25,
        scalings: str = "edm",
    ) -> None:
        super().__init__()
        check_range(sigma_min, sigma_max)
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}; change noise.sigma_data")
        if scalings not in ("edm", "flow"):
            raise ValueError(f"scalings must be edm or flow, got {scalings}; change denoiser.scalings")
        self.network = network
        self.scalings = scalings
        self.boundary = boundary
        self.sigma_data = sigma_data
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.noise_scale = noise_scale
        self.autocast_dtype: torch.dtype | None = None  # of the raw network, in sampling; see models.execution
        self.in_graphs = False

    @property
    def config(self) -> dict[str, Any]:
        """Everything needed to build this denoiser again, as plain values."""
        own = ("boundary", "sigma_data", "sigma_min", "sigma_max", "noise_scale", "scalings")
        return {"network": self.network.config, **{name: getattr(self, name) for name in own}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Denoiser:
        """Inverse of `config`; weights are fresh."""
        config = dict(config)
        return cls(UNet(**config.pop("network")), **config)

    def get_extra_state(self) -> dict[str, Any]:
        """`config` travels in every state dict, so that a checkpoint says what it holds."""
        return self.config

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuse the state of a denoiser that was built otherwise."""
        if different := self.differences(state):
            raise ValueError(f"the checkpoint is of another model ({different}); use its settings or another run_name")

    def differences(self, other: dict[str, Any], ignore: tuple[str, ...] = ()) -> str:
        """Settings that differ from those of another `config`, as text; empty if none does."""
        mine, theirs = _flat(self.config), _flat(other)
        names = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        return ", ".join(
            f"{key} is {mine.get(key)} here, {theirs.get(key)} there" for key in names if key not in ignore
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.network.in_channels, self.network.image_size, self.network.image_size)

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 if unconditional."""
        return self.network.num_classes

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """The clean image that the model sees behind `x`; float32 [B, C, H, W].

        Args:
            x: [B, C, H, W], image plus noise of standard deviation sigma.
            sigma: [B], positive.
            labels: [B] int64, -1 for no label; an unconditional model ignores them.
            augment_labels: [B, augment_channels], what was done to the image; None in sampling.
        """
        if sigma.shape != x.shape[:1]:
            raise ValueError(f"sigma must have shape [{len(x)}] (one level an image), got {list(sigma.shape)}")
        x, sigma = x.float(), sigma.float()
        if self.scalings == "flow":
            c = flow_scalings(sigma, boundary=self.boundary)
        else:
            c = consistency_scalings(sigma, sigma_data=self.sigma_data, boundary=self.boundary)
        c_noise = self.noise_scale * sigma.log()
        inputs = (append_dims(c.input, x.ndim) * x, c_noise, labels if self.num_classes else None)
        with nullcontext() if self.autocast_dtype is None else torch.autocast(x.device.type, self.autocast_dtype):
            raw = self.network(*inputs, *(() if augment_labels is None else (augment_labels,)))
        return append_dims(c.skip, x.ndim) * x + append_dims(c.out, x.ndim) * raw.float()


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """One level; arguments that an older version did not write have their defaults."""
    own = {key: value for key, value in config.items() if key != "network"}
    return {**_defaults(Denoiser), **own, **_defaults(UNet), **config["network"]}


def _defaults(made: type) -> dict[str, Any]:
    return {
        name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for name, parameter in inspect.signature(made).parameters.items()
        if parameter.default is not parameter.empty
    }
