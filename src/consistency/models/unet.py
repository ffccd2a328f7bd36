"""One UNet for every recipe; the published backbones are choices of its arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consistency.models.layers import (
    ALMOST_ZERO,
    BlockStyle,
    ConvResample,
    FourierEmbedding,
    PositionalEmbedding,
    PyramidConv,
    Resample,
    ResidualBlock,
    add_augment_labels,
)
from consistency.models.register import register_network

MAX_CHANNELS = 100_000  # of a layer: beyond it, the first convolution alone has 10^11 weights


@register_network("unet")
class UNet(nn.Module):
    """F(x, c_noise, labels), the raw network: [B, C, H, W] -> [B, C, H, W].

    With the defaults this is DDPM++ (Song et al. 2021, as in EDM App. F). NCSN++ adds a Fourier embedding, a smoother
    resampling filter and the input pyramid; ADM (Dhariwal & Nichol 2021) is `adm` with its own width, heads and norms.

    Args:
        image_size: Height and width of the images.
        in_channels: Image channels.
        out_channels: Channels of the output; None for `in_channels`. iDDPM's networks have twice as many.
        num_classes: Number of labels; 0 for an unconditional network.
        channels: Width at full size.
        channel_mult: Width factor at each size, from full size down; its length is the number of sizes. In ADM the
            first is also that of the stem.
        num_blocks: Residual blocks at each size.
        attention_resolutions: Image sizes (not factors) at which attention follows a block; sizes that the network does
            not have are passed over.
        head_channels: Least channels per attention head; None for `num_heads` heads.
        num_heads: Heads of every attention where `head_channels` is None.
        dropout: Probability in each residual block.
        dropout_max_resolution: Dropout only at feature maps up to this size; None for all (iCT, App. B: 16).
        fourier_scale: Scale of a Fourier noise embedding (NCSN++ 16, iCT 0.02); None for the positional one.
        noise_channel_mult: Length of the noise embedding in units of `channels` (DDPM++ 1, NCSN++ 2).
        emb_channel_mult: Length of the embedding that the blocks take, in units of `channels`.
        scale_shift: AdaGN instead of adding the embedding (ADM).
        skip_scale: Factor after each residual sum (DDPM++, NCSN++ sqrt(1/2), ADM 1).
        resample_filter: Filter taps of down- and upsampling (NCSN++ 1, 3, 3, 1).
        norm_eps: Of the group norms (DDPM++, NCSN++ 1e-6, ADM 1e-5).
        norm_groups: Groups of the norms; None for min(32, channels // 4) (EDM), 32 in OpenAI's code.
        input_pyramid: Shrunken, convolved copies of the input are added at each smaller size (NCSN++).
        augment_channels: Numbers that describe the augmentation of an image (EDM 9); 0 for none.
        conv_resample: Strided convolutions between the sizes instead of residual blocks (OpenAI's early networks).
        adm: The layout of ADM: its positional embedding, labels after the embedding's layers instead of before,
            attention after every decoder block instead of the last of a size, resampling without a learned skip branch,
            and its initialisation.

    Raises:
        ValueError: if an argument is out of range, the image size cannot be halved often enough, or widths do not
            divide into heads or groups.
    """

    config: dict[str, Any]  # the arguments; see `register_network`

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        num_classes: int = 0,
        channels: int = 128,
        channel_mult: Sequence[float] = (2, 2, 2),
        num_blocks: int = 4,
        attention_resolutions: Sequence[int] = (16,),
        head_channels: int | None = None,
        num_heads: int = 1,
        dropout: float = 0.0,
        dropout_max_resolution: int | None = None,
        fourier_scale: float | None = None,
        noise_channel_mult: float = 1,
        emb_channel_mult: float = 4,
        scale_shift: bool = False,
        skip_scale: float = 0.5**0.5,
        resample_filter: Sequence[float] = (1, 1),
        norm_eps: float = 1e-6,
        norm_groups: int | None = None,
        input_pyramid: bool = False,
        augment_channels: int = 0,
        conv_resample: bool = False,
        adm: bool = False,
        out_channels: int | None = None,
    ) -> None:
        _check_range(locals())
        super().__init__()
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.augment_channels, self.adm = augment_channels, adm
        emb_channels, noise_channels = round(emb_channel_mult * channels), round(noise_channel_mult * channels)
        blocks = _Blocks(
            BlockStyle(
                emb_channels,
                scale_shift=scale_shift,
                skip_scale=skip_scale,
                norm_eps=norm_eps,
                norm_groups=norm_groups,
                adm=adm,
            ),
            attention_resolutions=tuple(attention_resolutions),
            head_channels=head_channels,
            num_heads=num_heads,
            dropout=dropout,
            dropout_max_resolution=dropout_max_resolution,
            filter_taps=tuple(resample_filter),
            strided=conv_resample,
        )
        self.embed_noise = (
            PositionalEmbedding(noise_channels, adm=adm)
            if fourier_scale is None
            else FourierEmbedding(noise_channels, fourier_scale)
        )
        label_channels = emb_channels if adm else noise_channels
        self.embed_label = nn.Linear(num_classes, label_channels, bias=not adm) if num_classes else None
        self.linear0 = nn.Linear(noise_channels, emb_channels)
        self.linear1 = nn.Linear(emb_channels, emb_channels)

        widths = [round(channels * mult) for mult in channel_mult]
        self.stem = nn.Conv2d(in_channels, widths[0] if adm else channels, 3, padding=1)
        skips = self._build_encoder(blocks, widths, num_blocks, input_pyramid)
        smallest, width = image_size >> (len(widths) - 1), skips[-1]
        self.middle = nn.ModuleList(
            [blocks.residual(width, width, smallest, attention=attention) for attention in (True, False)]
        )
        self._build_decoder(blocks, widths, num_blocks, skips)
        self.out_norm = blocks.style.norm(widths[0])
        self.out_conv = nn.Conv2d(widths[0], out_channels or in_channels, 3, padding=1)

        for module in (None if adm else self.embed_label, self.linear0, self.linear1, self.stem):
            if module is not None:
                blocks.style.init(module)
        blocks.style.init(self.out_conv, scale=ALMOST_ZERO)
        if adm and self.embed_label is not None:
            nn.init.normal_(self.embed_label.weight)  # as an embedding of its own for each label
        self.embed_augment = nn.Linear(augment_channels, noise_channels, bias=False) if augment_channels else None
        if self.embed_augment is not None:
            blocks.style.init(self.embed_augment, scale=ALMOST_ZERO if adm else 1.0)

    def _build_encoder(self, blocks: _Blocks, widths: list[int], num_blocks: int, input_pyramid: bool) -> list[int]:
        """Blocks from full size down; returns the widths of their outputs, the stem's first."""
        self.encoder, self.pyramid = nn.ModuleList(), nn.ModuleList()
        self.shrinks: list[bool] = []  # of each block of the encoder: whether it halves the size
        skips, pyramid_width = [self.stem.out_channels], self.in_channels
        for level, width in enumerate(widths):
            size = self.image_size >> level
            if level:
                self.encoder.append(blocks.resample(skips[-1], size, up=False))
                self.shrinks.append(True)
                skips.append(skips[-1])
                if input_pyramid:
                    self.pyramid.append(PyramidConv(pyramid_width, skips[-1], blocks.filter_taps))
                    pyramid_width = skips[-1]
            for _ in range(num_blocks):
                attention = size in blocks.attention_resolutions
                self.encoder.append(blocks.residual(skips[-1], width, size, attention=attention))
                self.shrinks.append(False)
                skips.append(width)
        return skips

    def _build_decoder(self, blocks: _Blocks, widths: list[int], num_blocks: int, skips: list[int]) -> None:
        """Blocks from the smallest size up; all but those that enlarge take an output of the encoder, last first."""
        self.decoder, skips = nn.ModuleList(), list(skips)
        self.takes_skip: list[bool] = []
        width = skips[-1]
        for level in reversed(range(len(widths))):
            size = self.image_size >> level
            if level < len(widths) - 1:
                self.decoder.append(blocks.resample(width, size, up=True))
                self.takes_skip.append(False)
            for index in range(num_blocks + 1):
                attention = size in blocks.attention_resolutions and (self.adm or index == num_blocks)
                self.decoder.append(blocks.residual(width + skips.pop(), widths[level], size, attention=attention))
                self.takes_skip.append(True)
                width = widths[level]

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """Raw output F.

        Args:
            x: [B, C, H, W], scaled to unit variance by the caller.
            c_noise: [B], the noise level as the network sees it.
            labels: [B] int64, -1 for no label; None for unconditional networks.
            augment_labels: [B, augment_channels]; None means no augmentation, as in sampling.
        """
        emb = self._embed(c_noise, labels, augment_labels)
        hidden, image = self.stem(x), x
        skips, pyramid = [hidden], iter(self.pyramid)
        for block, shrinks in zip(self.encoder, self.shrinks, strict=True):
            hidden = block(hidden, emb)
            if shrinks and self.pyramid:
                hidden = image = (hidden + next(pyramid)(image)) * 0.5**0.5
            skips.append(hidden)
        for block in self.middle:
            hidden = block(hidden, emb)
        for block, takes_skip in zip(self.decoder, self.takes_skip, strict=True):
            hidden = block(torch.cat([hidden, skips.pop()], dim=1) if takes_skip else hidden, emb)
        return self.out_conv(F.silu(self.out_norm(hidden)))

    def _embed(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """[B], [B], [B, augment_channels] -> [B, emb_channels]."""
        emb = self.embed_noise(c_noise)
        emb = add_augment_labels(emb, self.embed_augment, augment_labels)
        label_emb: Tensor | float = 0.0
        if self.embed_label is not None:
            if labels is None:
                raise ValueError(f"this network is conditional on {self.num_classes} classes, but labels is None")
            one_hot = F.one_hot(labels.clamp(min=0), self.num_classes).to(emb.dtype) * (labels >= 0)[:, None]
            # EDM scales the one-hot vector to unit variance for DDPM++ and NCSN++.
            label_emb = self.embed_label(one_hot if self.adm else one_hot * self.num_classes**0.5)
        if self.adm:
            return F.silu(self.linear1(F.silu(self.linear0(emb))) + label_emb)
        return F.silu(self.linear1(F.silu(self.linear0(emb + label_emb))))


def _check_range(given: dict[str, Any]) -> None:
    """Refuse arguments that would fail deep inside, or make a network that is none."""

    def number(name: str, holds: Callable[[float], bool], allowed: str, *, or_none: bool = False) -> None:
        value = given[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        check(name, (or_none and value is None) or (is_number and holds(value)), allowed + (" or null" * or_none))

    def integer(name: str, least: int, *, or_none: bool = False, most: int = MAX_CHANNELS) -> None:
        value, allowed = given[name], f"an integer, at least {least}" + (" or null" * or_none)
        check(name, (or_none and value is None) or (type(value) is int and least <= value <= most), allowed)

    def check(name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"network.{name} is {given[name]}; allowed: {allowed}")

    for name in ("image_size", "in_channels", "channels", "num_blocks", "num_heads"):
        integer(name, 1)
    for name in ("num_classes", "augment_channels"):
        integer(name, 0, most=10**9)
    for name in ("head_channels", "dropout_max_resolution", "norm_groups", "out_channels"):
        integer(name, 1, or_none=True)
    for name in ("noise_channel_mult", "emb_channel_mult", "skip_scale", "norm_eps"):
        number(name, lambda value: value > 0, "a positive number")
    number("fourier_scale", lambda value: value > 0, "a positive number", or_none=True)
    number("dropout", lambda value: 0 <= value < 1, "a number from 0 to below 1")
    for name in ("scale_shift", "input_pyramid", "conv_resample", "adm"):
        check(name, isinstance(given[name], bool), "true or false")
    mult, sizes, taps = given["channel_mult"], given["attention_resolutions"], given["resample_filter"]
    is_mult = _is_list(mult, lambda factor: isinstance(factor, int | float) and 0 < factor < MAX_CHANNELS)
    check("channel_mult", is_mult and len(mult) > 0, "a list of positive numbers, one for each size")
    check("attention_resolutions", _is_list(sizes, lambda s: type(s) is int and s >= 1), "a list of sizes in pixels")
    is_filter = _is_list(taps, lambda tap: isinstance(tap, int | float)) and len(taps) % 2 == 0 and sum(taps) > 0
    check("resample_filter", is_filter, "a list of an even number of taps, as [1,1] or [1,3,3,1]")
    halvings = len(mult) - 1
    allowed = f"short enough that data.image_size={given['image_size']} can be halved {halvings} times"
    check("channel_mult", given["image_size"] % 2**halvings == 0, allowed)


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(fits, value))


@dataclass(frozen=True)
class _Blocks:
    """Makes the blocks of one network; arguments as of `UNet`."""

    style: BlockStyle
    attention_resolutions: tuple[int, ...]
    head_channels: int | None
    num_heads: int
    dropout: float
    dropout_max_resolution: int | None
    filter_taps: tuple[float, ...]
    strided: bool

    def residual(
        self, in_channels: int, out_channels: int, size: int, *, attention: bool, resample: Resample | None = None
    ) -> ResidualBlock:
        """A residual block whose output has this size."""
        active = self.dropout_max_resolution is None or size <= self.dropout_max_resolution
        return ResidualBlock(
            in_channels,
            out_channels,
            self.style,
            resample=resample,
            dropout=self.dropout if active else 0.0,
            num_heads=self._heads(out_channels) if attention else 0,
        )

    def resample(self, width: int, size: int, *, up: bool) -> nn.Module:
        """What halves or doubles the images to this size."""
        if self.strided:
            return ConvResample(width, up=up)
        return self.residual(width, width, size, attention=False, resample=Resample(self.filter_taps, up=up))

    def _heads(self, channels: int) -> int:
        # Rounded down where the width is not a multiple, as EDM does.
        heads = self.num_heads if self.head_channels is None else channels // self.head_channels
        if heads < 1 or channels % heads:
            what = f"{self.num_heads} heads" if self.head_channels is None else f"heads of {self.head_channels}"
            raise ValueError(
                f"{channels} channels do not divide into {what}; change network.head_channels or network.num_heads"
            )
        return heads
