"""The preconditioned network: D(x; sigma) of EDM, f(x, sigma) of consistency models, and flow maps of two times."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from consistency.models.legacy import upgrade_config
from consistency.models.parametrization import EDM, Coefficients, Parametrization
from consistency.models.register import build, describe_network, describe_parametrization, find
from consistency.noise.grids import SIGMA_MAX, SIGMA_MIN, check_range
from consistency.ops import append_dims

KINDS = ("diffusion", "consistency", "flow_map")


class Denoiser(nn.Module):
    """c_skip x + c_out F(c_in x, c_noise, labels), always fully preconditioned: [B, C, H, W] -> [B, C, H, W].

    Preconditioning runs in float32 whatever the precision of the network. Where sigma <= boundary, the model is x
    itself, to the last bit.

    Args:
        network: The raw network F; see `models.register.Network`.
        parametrization: Coefficients of the formula above, and the boundary; see `models.parametrization`.
        kind: `diffusion` (D is the posterior mean, sampled by solvers of an ODE), `consistency` (f is the end of the
            trajectory, sampled in one or a few evaluations) or `flow_map` (of two levels). It is saved with the model
            and decides what may be done with it. None: consistency where the boundary is above 0, else diffusion; a
            training method sets its own.
        sigma_min: Smallest noise level of the model.
        sigma_max: Largest noise level, where sampling starts.
        label_dropout: Probability with which training hides an image's label (-1), so that the model learns to do
            without and can be guided (Ho & Salimans 2022). Methods hide labels: all networks of a step see the same.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        parametrization: Parametrization | None = None,
        *,
        kind: str | None = None,
        sigma_min: float = SIGMA_MIN,
        sigma_max: float = SIGMA_MAX,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_range(sigma_min, sigma_max)
        if missing := [name for name in ("image_size", "in_channels", "num_classes") if not hasattr(network, name)]:
            raise ValueError(f"the network {type(network).__name__} lacks the attribute {missing[0]}")
        self.parametrization: Parametrization = EDM() if parametrization is None else parametrization
        kind = kind or ("consistency" if self.boundary > 0 else "diffusion")
        if kind not in KINDS:
            raise ValueError(f"kind is {kind}; allowed: {', '.join(KINDS)}; change kind")
        if not 0 <= label_dropout < 1 or (label_dropout > 0 and not network.num_classes):
            raise ValueError(
                f"label_dropout is {label_dropout}; allowed: from 0 to below 1, and 0 without labels "
                "(network.num_classes=0); change model.label_dropout"
            )
        self.network = network
        self.kind = kind
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.label_dropout = label_dropout
        self.autocast_dtype: torch.dtype | None = None  # of the raw network, in sampling; see models.execution
        self.in_graphs = False

    @property
    def boundary(self) -> float:
        """Level at and below which the model is the identity."""
        return self.parametrization.boundary

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.network.in_channels, self.network.image_size, self.network.image_size)  # type: ignore[return-value]

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 if unconditional."""
        return self.network.num_classes  # type: ignore[return-value]

    @property
    def config(self) -> dict[str, Any]:
        """Everything needed to build this denoiser again, as plain values.

        Raises:
            ValueError: if the network or the parametrization has no registered name.
        """
        own = ("kind", "sigma_min", "sigma_max", "label_dropout")
        return {
            "network": describe_network(self.network),
            "parametrization": describe_parametrization(self.parametrization),
            **{name: getattr(self, name) for name in own},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Denoiser:
        """Inverse of `config`, of earlier versions too; weights are fresh."""
        config = upgrade_config(config)
        parts = {kind: build(kind, config.pop(kind)) for kind in ("network", "parametrization")}
        return cls(**parts, **config)

    def get_extra_state(self) -> dict[str, Any]:
        """`config` travels in every state dict, so that a checkpoint says what it holds."""
        return self.config

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuse the state of a denoiser that was built otherwise."""
        if different := self.differences(state):
            raise ValueError(f"the checkpoint is of another model ({different}); use its settings or another run_name")

    def differences(self, other: dict[str, Any], ignore: tuple[str, ...] = ()) -> str:
        """Settings that differ from those of another `config`, as text; empty if none does."""
        mine, theirs = _flat(self.config), _flat(upgrade_config(other))
        ignore = ignore if "kind" in theirs else (*ignore, "kind")  # earlier versions did not write it
        names = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        return ", ".join(
            f"{key} is {mine.get(key)} here, {theirs.get(key)} there" for key in names if key not in ignore
        )

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, sigma_end: Tensor | None = None, **extra: Tensor
    ) -> Tensor:
        """The clean image that the model sees behind `x`; float32 [B, C, H, W].

        Args:
            x: [B, C, H, W], image plus noise of standard deviation sigma.
            sigma: [B], 0 or more.
            labels: [B] int64, -1 for no label; an unconditional model ignores them.
            sigma_end: [B], below sigma, of flow maps: the result is g, with which x (s / sigma) + (1 - s / sigma) g is
                the trajectory's point at level s = sigma_end. None for models of one level.
            **extra: Further inputs of the network, as `augment_labels` [B, n] in training.
        """
        x, sigma = x.float(), sigma.float()
        is_clean = sigma <= self.boundary
        # No network sees ln 0: clean rows are evaluated elsewhere, and the result is dropped.
        c, raw = self._evaluate(x, torch.where(is_clean, self.sigma_max, sigma), labels, sigma_end, extra)
        out = append_dims(c.skip, x.ndim) * x + append_dims(c.out, x.ndim) * raw
        return torch.where(append_dims(is_clean, x.ndim), x, out)

    def raw(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, sigma_end: Tensor | None = None, **extra: Tensor
    ) -> Tensor:
        """F(c_in x, c_noise, labels), float32 [B, C, H, W], for losses on the network's own output; see `forward`.

        Args:
            x: As of `forward`.
            sigma: [B], positive.
            labels: As of `forward`.
            sigma_end: As of `forward`.
            **extra: As of `forward`.
        """
        return self._evaluate(x.float(), sigma.float(), labels, sigma_end, extra)[1]

    def _evaluate(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None, sigma_end: Tensor | None, extra: dict[str, Tensor]
    ) -> tuple[Coefficients, Tensor]:
        if sigma.shape != x.shape[:1]:
            raise ValueError(f"sigma must have shape [{len(x)}] (one level an image), got {list(sigma.shape)}")
        c = self.parametrization(sigma)
        if sigma_end is not None:
            if self.kind != "flow_map":
                raise ValueError(f"sigma_end is for models of kind flow_map, this one is of kind {self.kind}")
            extra = {**extra, "c_noise_end": self.parametrization(sigma_end.float().clamp(min=self.sigma_min)).noise}
        inputs = (append_dims(c.input, x.ndim) * x, c.noise, labels if self.num_classes else None)
        with nullcontext() if self.autocast_dtype is None else torch.autocast(x.device.type, self.autocast_dtype):
            raw = self.network(*inputs, **extra)[
                :, : x.shape[1]
            ]  # some predict variances too, in more channels (iDDPM)
        if raw.shape != x.shape:
            raise ValueError(f"the network gave {list(raw.shape)} for images {list(x.shape)}; F has the shape of x")
        return c, raw.float()


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """One level; arguments that an older version did not write have their defaults."""
    flat = {"label_dropout": 0.0, **{key: value for key, value in config.items() if key not in _PARTS}}
    for part in _PARTS:
        flat[part] = config[part]["name"]
        arguments = {**_defaults(find(part, config[part]["name"])), **config[part]["arguments"]}
        flat |= {f"{part}.{name}": value for name, value in arguments.items()}
    return flat


_PARTS = ("network", "parametrization")


def _defaults(made: type) -> dict[str, Any]:
    return {
        name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for name, parameter in inspect.signature(made).parameters.items()
        if parameter.default is not parameter.empty
    }
