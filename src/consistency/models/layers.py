"""Building blocks of the UNet: noise embeddings, resampling convolution, attention, residual block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PositionalEmbedding(nn.Module):
    """Sinusoidal embedding of c_noise: [B] -> [B, channels].

    DDPM++: [sin | cos], frequencies from 1 down to 1/10000, both ends included. ADM: [cos | sin], frequencies
    10000^(-k / half), the last one above 1/10000. With c_noise = 0.25 ln sigma both are as insensitive to small changes
    of sigma as the Fourier embedding of iCT at scale 0.02 (iCT, Sec. 3.1).
    """

    def __init__(self, channels: int, *, adm: bool = False) -> None:
        super().__init__()
        if channels < 4 or channels % 2:
            raise ValueError(
                f"the noise embedding needs an even number >= 4 of channels, got {channels}; change network.channels"
            )
        self.channels, self.adm = channels, adm

    def forward(self, c_noise: Tensor) -> Tensor:
        """[B] -> [B, channels]."""
        half = self.channels // 2
        ramp = torch.arange(half, device=c_noise.device, dtype=torch.float32)
        # Two ways to write one power, each as its weights were trained with: at 250 ln(sigma) their roundings differ by
        # up to 1e-4 in the embedding.
        freqs = (ramp * -math.log(10000) / half).exp() if self.adm else (1 / 10000) ** (ramp / (half - 1))
        angles = torch.outer(c_noise.float(), freqs)
        sin, cos = angles.sin(), angles.cos()
        return torch.cat([cos, sin] if self.adm else [sin, cos], dim=1)


class FourierEmbedding(nn.Module):
    """Random Fourier features of c_noise: [B] -> [B, channels] = [sin | cos] (NCSN++).

    The order is that of EDM's networks, which swap the halves of their embedding; weights are imported as they are.

    Args:
        channels: Length of the embedding.
        scale: Standard deviation of the frequencies. NCSN++ uses 16; iCT 0.02, because consistency training is
            unstable when neighbouring levels embed very differently (iCT, Sec. 3.1, Fig. 1).
    """

    freqs: Tensor

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, c_noise: Tensor) -> Tensor:
        """[B] -> [B, channels]."""
        angles = torch.outer(c_noise.float(), 2 * math.pi * self.freqs)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Resample(nn.Module):
    """Halve or double the image size with a fixed separable filter: [B, C, H, W] -> [B, C, H/2 or 2H, ...].

    Args:
        filter_taps: 1-D filter; (1, 1) averages or repeats pixels (DDPM++, ADM), (1, 3, 3, 1) is smoother (NCSN++).
        up: Double when true, halve when false.
    """

    kernel: Tensor

    def __init__(self, filter_taps: tuple[float, ...], *, up: bool) -> None:
        super().__init__()
        # Plain numbers: on the `meta` device, where files are checked, products of tensors import the whole compiler.
        scale = sum(filter_taps) ** 2 / (4 if up else 1)
        kernel = torch.tensor([[a * b / scale for b in filter_taps] for a in filter_taps], dtype=torch.float32)
        self.register_buffer("kernel", kernel, persistent=False)
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W] or [B, C, H/2, W/2]."""
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)
        padding = (self.kernel.shape[-1] - 1) // 2
        if self.up:
            return F.conv_transpose2d(x, kernel, stride=2, padding=padding, groups=channels)
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)


class PyramidConv(nn.Module):
    """Halve the size and convolve, for the input pyramid of NCSN++: [B, in, H, W] -> [B, out, H/2, W/2].

    The 3x3 convolution comes first, at full size and with room for the filter's border, the filter second (EDM's fused
    resampling); the two orders differ at the borders.
    """

    def __init__(self, in_channels: int, out_channels: int, filter_taps: tuple[float, ...]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1 + (len(filter_taps) - 1) // 2)
        self.resample = Resample(filter_taps, up=False)
        init_weights(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/2, W/2]."""
        out = F.conv2d(x, self.conv.weight, padding=self.conv.padding)
        kernel = self.resample.kernel.to(out.dtype).expand(out.shape[1], 1, -1, -1)
        out = F.conv2d(out, kernel, stride=2, groups=out.shape[1])
        return out if self.conv.bias is None else out + self.conv.bias.to(out.dtype)[:, None, None]


class ConvResample(nn.Module):
    """Halve by a strided 3x3 convolution, or double by repeating pixels and convolving (OpenAI, resblock_updown off).

    Takes the embedding that a residual block takes, and ignores it.
    """

    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W] or [B, C, H/2, W/2]."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest") if self.up else x)


@dataclass(frozen=True)
class BlockStyle:
    """What all residual blocks of a network share.

    Args:
        emb_channels: Length of the embedding that every block takes.
        scale_shift: The embedding scales and shifts after the second norm (AdaGN, ADM) instead of being added before.
        skip_scale: Factor after each residual sum; sqrt(1/2) keeps the variance (DDPM++, NCSN++), 1 in ADM.
        norm_eps: Of the group norms.
        norm_groups: Groups of the norms; None for min(32, channels // 4) (EDM). OpenAI's fixed 32 is the same from 128
            channels on.
        adm: ADM's initialisation, and no convolution on the skip branch of a block that only resamples.
    """

    emb_channels: int
    scale_shift: bool = False
    skip_scale: float = 1.0
    norm_eps: float = 1e-5
    norm_groups: int | None = None
    adm: bool = False

    def norm(self, channels: int) -> nn.GroupNorm:
        """Group norm of so many channels."""
        groups = self.norm_groups or max(min(32, channels // 4), 1)
        if channels % groups:
            raise ValueError(
                f"{channels} channels do not divide into {groups} groups; change network.channels or norm_groups"
            )
        return nn.GroupNorm(groups, channels, eps=self.norm_eps)

    def init(self, module: nn.Module, scale: float = 1.0) -> None:
        """Fresh weights of a convolution or linear layer.

        DDPM++ and NCSN++: xavier-uniform times `scale`, zero bias. ADM: PyTorch's own, which are uniform within
        1 / sqrt(fan_in) as EDM's and OpenAI's, and exact zeros for the last layer of a branch.
        """
        if not self.adm:
            init_weights(module, scale)
        elif scale == ALMOST_ZERO:
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


class SelfAttention(nn.Module):
    """Self-attention over pixels with a residual connection: [B, C, H, W] -> same.

    The rows of `qkv` are ordered (three, head, dim), as in OpenAI's networks; importers of other orders permute.
    """

    def __init__(self, channels: int, style: BlockStyle, *, num_heads: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = style.norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.skip_scale = style.skip_scale
        style.init(self.qkv, scale=math.sqrt(0.2))
        style.init(self.proj, scale=ALMOST_ZERO)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.num_heads, channels // self.num_heads, height * width)
        query, key, value = qkv.transpose(-1, -2).unbind(1)  # each [B, heads, H*W, dim]
        out = F.scaled_dot_product_attention(query, key, value)
        out = self.proj(out.transpose(-1, -2).reshape(batch, channels, height, width))
        return (x + out) * self.skip_scale


class ResidualBlock(nn.Module):
    """Norm, SiLU, (resample,) conv, noise embedding, norm, SiLU, dropout, conv, skip; then optional attention.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        style: What it shares with the other blocks.
        resample: Halves or doubles the size on both branches, or None.
        dropout: Probability, before the second convolution.
        num_heads: Heads of the self-attention that follows; 0 for none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        *,
        resample: Resample | None = None,
        dropout: float = 0.0,
        num_heads: int = 0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.scale_shift, self.skip_scale = style.scale_shift, style.skip_scale
        self.norm0 = style.norm(in_channels)
        self.resample = resample
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(style.emb_channels, out_channels * (2 if style.scale_shift else 1))
        self.norm1 = style.norm(out_channels)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # DDPM++ and NCSN++ learn the skip branch of a resampling block too.
        needs_proj = in_channels != out_channels or (resample is not None and not style.adm)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if needs_proj else nn.Identity()
        self.attention = SelfAttention(out_channels, style, num_heads=num_heads) if num_heads else None
        for module in (self.conv0, self.affine, self.skip):
            style.init(module)
        style.init(self.conv1, scale=ALMOST_ZERO)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """([B, in, H, W], [B, emb]) -> [B, out, H', W']."""
        hidden = F.silu(self.norm0(x))
        if self.resample is not None:
            hidden, x = self.resample(hidden), self.resample(x)
        hidden = self.conv0(hidden)
        shift = self.affine(emb)[:, :, None, None]  # [B, out or 2 out, 1, 1]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            hidden = F.silu(torch.addcmul(shift, self.norm1(hidden), scale + 1))
        else:
            hidden = F.silu(self.norm1(hidden + shift))
        hidden = self.conv1(F.dropout(hidden, self.dropout, self.training))
        out = (hidden + self.skip(x)) * self.skip_scale
        return self.attention(out) if self.attention is not None else out


# Last layers of a branch start near zero, so that a fresh block is close to the identity (EDM, DDPM++).
ALMOST_ZERO = 1e-5


def init_weights(module: nn.Module, scale: float = 1.0) -> None:
    """Xavier-uniform weight times `scale`, zero bias; modules without weights are left alone (EDM, DDPM++)."""
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return
    nn.init.xavier_uniform_(module.weight)
    with torch.no_grad():
        module.weight.mul_(scale)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def add_augment_labels(emb: Tensor, layer: nn.Linear | None, augment_labels: Tensor | None) -> Tensor:
    """The embedding [B, channels] with what was done to the images [B, n] added; None: nothing was, as in sampling.

    Raises:
        ValueError: if there are augmentation labels, and the network has no layer for them.
    """
    if layer is not None:
        # Zeros say that nothing was augmented; the layer takes part all the same, as DDP wants of every parameter.
        none = emb.new_zeros(len(emb), layer.in_features)
        return emb + layer(none if augment_labels is None else augment_labels.to(emb.dtype))
    if augment_labels is not None:
        raise ValueError("the network takes no augmentation labels; set network.augment_channels=9, or augment=none")
    return emb
