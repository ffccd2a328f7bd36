"""Building blocks of the UNet: noise embeddings, resampling convolution, attention, residual block."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PositionalEmbedding(nn.Module):
    """Sinusoidal embedding of c_noise: [B] -> [B, channels] = [sin | cos] (EDM, DDPM++).

    Frequencies run from 1 down to 1/10000, both ends included. With c_noise = 0.25 ln sigma it is as insensitive to
    small changes of sigma as the Fourier embedding of iCT at scale 0.02 (iCT, Sec. 3.1).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 4 or channels % 2:
            raise ValueError(f"the noise embedding needs an even number >= 4 of channels, got {channels}")
        self.channels = channels

    def forward(self, c_noise: Tensor) -> Tensor:
        """[B] -> [B, channels]."""
        half = self.channels // 2
        ramp = torch.arange(half, device=c_noise.device, dtype=torch.float32) / (half - 1)
        angles = torch.outer(c_noise.float(), (1 / 10000) ** ramp)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class FourierEmbedding(nn.Module):
    """Random Fourier features of c_noise: [B] -> [B, channels] = [cos | sin] (NCSN++).

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
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class Resample(nn.Module):
    """Halve or double the image size with a fixed separable filter: [B, C, H, W] -> [B, C, H/2 or 2H, ...].

    Args:
        filter_taps: 1-D filter; (1, 1) averages or repeats pixels (DDPM++, ADM), (1, 3, 3, 1) is smoother (NCSN++).
        up: Double when true, halve when false.
    """

    kernel: Tensor

    def __init__(self, filter_taps: tuple[int, ...], *, up: bool) -> None:
        super().__init__()
        taps = torch.tensor(filter_taps, dtype=torch.float32)
        kernel = torch.outer(taps, taps) / taps.sum() ** 2
        self.register_buffer("kernel", kernel * 4 if up else kernel, persistent=False)
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W] or [B, C, H/2, W/2]."""
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)
        padding = (self.kernel.shape[-1] - 1) // 2
        if self.up:
            return F.conv_transpose2d(x, kernel, stride=2, padding=padding, groups=channels)
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """GroupNorm with min(32, channels // 4) groups (EDM); OpenAI's fixed 32 is the same from 128 channels on."""
    return nn.GroupNorm(max(min(32, channels // 4), 1), channels, eps=eps)


class SelfAttention(nn.Module):
    """Self-attention over pixels with a residual connection: [B, C, H, W] -> same.

    The rows of `qkv` are ordered (three, head, dim), as in OpenAI's networks; importers of other orders permute.
    """

    def __init__(self, channels: int, *, head_channels: int | None, eps: float, skip_scale: float) -> None:
        super().__init__()
        self.num_heads = channels // head_channels if head_channels else 1
        if head_channels and channels % head_channels:
            raise ValueError(
                f"{channels} channels do not divide into heads of {head_channels}; change network.head_channels"
            )
        self.norm = group_norm(channels, eps)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.skip_scale = skip_scale
        init_weights(self.qkv, scale=math.sqrt(0.2))
        init_weights(self.proj, scale=ALMOST_ZERO)

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
        emb_channels: Length of the noise embedding.
        resample: Halves or doubles the size on both branches, or None.
        dropout: Probability, before the second convolution.
        attention: Whether self-attention follows.
        head_channels: Channels a head of the attention; None for one head.
        scale_shift: The embedding scales and shifts after the second norm (AdaGN, ADM) instead of being added before.
        skip_scale: Factor after each residual sum; sqrt(1/2) keeps the variance (DDPM++, NCSN++), 1 in ADM.
        eps: Of the group norms.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        resample: Resample | None = None,
        dropout: float = 0.0,
        attention: bool = False,
        head_channels: int | None = None,
        scale_shift: bool = False,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.dropout = dropout
        self.scale_shift = scale_shift
        self.skip_scale = skip_scale
        self.norm0 = group_norm(in_channels, eps)
        self.resample = resample
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(emb_channels, out_channels * (2 if scale_shift else 1))
        self.norm1 = group_norm(out_channels, eps)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # DDPM++ and NCSN++ learn the skip branch of a resampling block too.
        needs_proj = in_channels != out_channels or resample is not None
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if needs_proj else nn.Identity()
        self.attention = (
            SelfAttention(out_channels, head_channels=head_channels, eps=eps, skip_scale=skip_scale)
            if attention
            else None
        )
        for module in (self.conv0, self.affine, self.skip):
            init_weights(module)
        init_weights(self.conv1, scale=ALMOST_ZERO)

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
