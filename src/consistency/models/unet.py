"""One UNet for every recipe; the published backbones are choices of its arguments."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consistency.models.layers import (
    ALMOST_ZERO,
    FourierEmbedding,
    PositionalEmbedding,
    Resample,
    ResidualBlock,
    group_norm,
    init_weights,
)


class UNet(nn.Module):
    """F(x, c_noise, labels), the raw network: [B, C, H, W] -> [B, C, H, W].

    With the defaults this is DDPM++ (Song et al. 2021, as in EDM App. F): positional embedding, attention in the
    encoder at the named sizes and in the last decoder block there, skip connections scaled by sqrt(1/2).

    Args:
        image_size: Height and width of the images.
        in_channels: Image channels, in and out.
        num_classes: Number of labels; 0 for an unconditional network.
        channels: Width at full size.
        channel_mult: Width factor at each size, from full size down; its length is the number of sizes.
        num_blocks: Residual blocks at each size.
        attention_resolutions: Image sizes (not factors) at which attention follows a block.
        head_channels: Channels per attention head; None for a single head.
        dropout: Probability in each residual block.
        dropout_max_resolution: Dropout only at feature maps up to this size; None for all (iCT, App. B: 16).
        fourier_scale: Scale of a Fourier noise embedding (NCSN++ 16, iCT 0.02); None for the positional one.
        noise_channel_mult: Length of the noise embedding in units of `channels` (DDPM++ 1, NCSN++ 2).
        scale_shift: AdaGN instead of adding the embedding (ADM).
        skip_scale: Factor after each residual sum.
        resample_filter: Filter taps of down- and upsampling.
        norm_eps: Of the group norms.

    Raises:
        ValueError: if the image size cannot be halved often enough.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        num_classes: int = 0,
        channels: int = 128,
        channel_mult: tuple[int, ...] | list[int] = (2, 2, 2),
        num_blocks: int = 4,
        attention_resolutions: tuple[int, ...] | list[int] = (16,),
        head_channels: int | None = None,
        dropout: float = 0.0,
        dropout_max_resolution: int | None = None,
        fourier_scale: float | None = None,
        noise_channel_mult: int = 1,
        scale_shift: bool = False,
        skip_scale: float = 0.5**0.5,
        resample_filter: tuple[int, ...] | list[int] = (1, 1),
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        arguments = locals()
        self.config: dict[str, Any] = {
            name: list(arguments[name]) if isinstance(arguments[name], tuple | list) else arguments[name]
            for name in inspect.signature(UNet).parameters
        }
        factor = 2 ** (len(channel_mult) - 1)
        if image_size % factor:
            raise ValueError(
                f"image_size must be divisible by {factor} for {len(channel_mult)} sizes, got {image_size}; "
                "change data.image_size or network.channel_mult"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}; change network.dropout")
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        emb_channels, noise_channels = 4 * channels, noise_channel_mult * channels

        def block(
            in_ch: int, out_ch: int, size: int, *, attention: bool, resample: Resample | None = None
        ) -> ResidualBlock:
            return ResidualBlock(
                in_ch,
                out_ch,
                emb_channels,
                resample=resample,
                dropout=dropout if dropout_max_resolution is None or size <= dropout_max_resolution else 0.0,
                attention=attention,
                head_channels=head_channels,
                scale_shift=scale_shift,
                skip_scale=skip_scale,
                eps=norm_eps,
            )

        self.embed_noise = (
            PositionalEmbedding(noise_channels)
            if fourier_scale is None
            else FourierEmbedding(noise_channels, fourier_scale)
        )
        self.embed_label = nn.Linear(num_classes, noise_channels) if num_classes else None
        self.linear0 = nn.Linear(noise_channels, emb_channels)
        self.linear1 = nn.Linear(emb_channels, emb_channels)

        sizes = [image_size >> level for level in range(len(channel_mult))]
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.encoder = nn.ModuleList()
        width, skips = channels, [channels]
        for level, (size, mult) in enumerate(zip(sizes, channel_mult, strict=True)):
            if level:
                self.encoder.append(
                    block(width, width, size, attention=False, resample=Resample(tuple(resample_filter), up=False))
                )
                skips.append(width)
            for _ in range(num_blocks):
                self.encoder.append(block(width, channels * mult, size, attention=size in attention_resolutions))
                width = channels * mult
                skips.append(width)

        smallest = sizes[-1]
        self.middle = nn.ModuleList(
            [block(width, width, smallest, attention=True), block(width, width, smallest, attention=False)]
        )
        self.decoder = nn.ModuleList()
        self._takes_skip: list[bool] = []
        for level in reversed(range(len(channel_mult))):
            size, mult = sizes[level], channel_mult[level]
            if level < len(channel_mult) - 1:
                self.decoder.append(
                    block(width, width, size, attention=False, resample=Resample(tuple(resample_filter), up=True))
                )
                self._takes_skip.append(False)
            for index in range(num_blocks + 1):
                attention = size in attention_resolutions and index == num_blocks
                self.decoder.append(block(width + skips.pop(), channels * mult, size, attention=attention))
                self._takes_skip.append(True)
                width = channels * mult
        self.out_norm = group_norm(width, norm_eps)
        self.out_conv = nn.Conv2d(width, in_channels, 3, padding=1)

        for module in (self.embed_label, self.linear0, self.linear1, self.stem):
            if module is not None:
                init_weights(module)
        init_weights(self.out_conv, scale=ALMOST_ZERO)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """F(x, c_noise, labels).

        Args:
            x: [B, C, H, W], already scaled by c_in.
            c_noise: [B], the noise conditioning.
            labels: [B] int64 in [0, num_classes), or None for an unconditional network.
        """
        # In float32 always: bf16 cannot tell neighbouring levels of a fine grid apart.
        with torch.autocast(x.device.type, enabled=False):
            emb = self._embed(c_noise.float(), labels)

        hidden = self.stem(x)
        skips = [hidden]
        for block in self.encoder:
            hidden = block(hidden, emb)
            skips.append(hidden)
        for block in self.middle:
            hidden = block(hidden, emb)
        for block, takes_skip in zip(self.decoder, self._takes_skip, strict=True):
            hidden = block(torch.cat([hidden, skips.pop()], dim=1) if takes_skip else hidden, emb)
        return self.out_conv(F.silu(self.out_norm(hidden)))

    def _embed(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """[B], [B] -> [B, 4 * channels]."""
        emb = self.embed_noise(c_noise)
        if self.embed_label is not None:
            if labels is None:
                raise ValueError(f"this network is conditional on {self.num_classes} classes, but labels is None")
            # EDM scales the one-hot vector to unit variance.
            one_hot = F.one_hot(labels, self.num_classes).to(emb.dtype)
            emb = emb + self.embed_label(one_hot * self.num_classes**0.5)
        return F.silu(self.linear1(F.silu(self.linear0(emb))))
