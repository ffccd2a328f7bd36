"""DiT: a transformer over patches of the image (Peebles & Xie 2023)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consistency.models.layers import PositionalEmbedding, add_augment_labels, init_weights
from consistency.models.register import register_network

NOISE_CHANNELS = 256  # sines and cosines of c_noise
NORM_EPS = 1e-6


@register_network("dit")
class DiT(nn.Module):
    """F(x, c_noise, labels), the raw network: [B, C, H, W] -> [B, C, H, W].

    The sizes of the paper (Table 1), each with patches of 2, 4 or 8 pixels: S is the default, 384 wide, 12 blocks,
    6 heads; B 768, 12, 12; L 1024, 24, 16; XL 1152, 28, 16. Its counts of parameters are of networks for latents of 4
    channels at 32x32 and 1000 classes that also predict variances: to ours they add patch_size^2 * 4 more outputs of
    the last layer, with hidden_size + 1 parameters each, and the table of positions, which we do not count,
    (32 / patch_size)^2 * hidden_size. XL/2 has 675.13M with these, 674.82M without.

    Args:
        image_size: Height and width of the images.
        in_channels: Image channels, in and out.
        num_classes: Number of labels; 0 for an unconditional network. One more is learned for -1, no label.
        patch_size: Height and width of a patch. Halving it makes four times the tokens, so that many times the work.
        hidden_size: Width of a token.
        depth: Number of blocks.
        num_heads: Heads of every attention.
        mlp_ratio: Width of a block's hidden layer, in units of `hidden_size`.
        dropout: Probability after the attention and after each layer of the MLP.
        augment_channels: Numbers that describe the augmentation of an image (EDM 9); 0 for none.

    Raises:
        ValueError: if an argument is out of range, or sizes do not divide.
    """

    config: dict[str, Any]  # the arguments; see `register_network`
    positions: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        num_classes: int = 0,
        patch_size: int = 2,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        augment_channels: int = 0,
    ) -> None:
        _check_range(locals())
        super().__init__()
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.augment_channels, self.patch_size = augment_channels, patch_size
        self.grid_size = image_size // patch_size

        self.patchify = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        positions = torch.as_tensor(sincos_positions(self.grid_size, hidden_size))
        self.register_buffer("positions", positions, persistent=False)
        # The paper's embedding, of another number: its steps run from 0 to 1000, c_noise = 0.25 ln(sigma) from -1.6 to
        # 1.1. Stretching c_noise to 1000 would tear neighbouring levels apart, which consistency training does not bear
        # (iCT, Sec. 3.1). As it is, the fastest waves turn once in 6.3 and are told apart well within the range.
        self.embed_noise = PositionalEmbedding(NOISE_CHANNELS, adm=True)
        self.linear0 = nn.Linear(NOISE_CHANNELS, hidden_size)
        self.linear1 = nn.Linear(hidden_size, hidden_size)
        table = torch.empty(num_classes + 1, hidden_size) if num_classes else None
        self.embed_label = None if table is None else nn.Embedding.from_pretrained(table, freeze=False)
        self.embed_augment = nn.Linear(augment_channels, hidden_size, bias=False) if augment_channels else None
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio, dropout) for _ in range(depth)])
        self.out_norm = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)
        self.out_modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.out_linear = nn.Linear(hidden_size, patch_size**2 * in_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        """Xavier, but normal for embeddings, and zero for what makes a fresh block the identity and F zero."""
        for module in self.modules():
            init_weights(module)
        nn.init.xavier_uniform_(self.patchify.weight.flatten(1))  # as of a linear layer: a view, filled in place
        for embedding in (self.linear0, self.linear1, self.embed_label):
            if embedding is not None:
                # Cut at 3 std: `normal_` imports the whole compiler on the `meta` device, where files are checked.
                nn.init.trunc_normal_(embedding.weight, std=0.02, a=-0.06, b=0.06)
        modulations = [module for name, module in self.named_modules() if name.endswith("modulation")]
        for module in (*modulations, self.out_linear):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

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
        emb = F.silu(self._embed(c_noise, labels, augment_labels, x.dtype))  # every modulation begins with the SiLU
        hidden = self.patchify(x).flatten(2).transpose(1, 2) + self.positions  # [B, tokens, hidden]
        for block in self.blocks:
            hidden = block(hidden, emb)
        shift, scale = self.out_modulation(emb).chunk(2, dim=1)
        return self._unpatchify(self.out_linear(modulate(self.out_norm(hidden), shift, scale)))

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """[B, tokens, patch * patch * C] -> [B, C, H, W]; tokens by rows, within a patch by rows, then channels."""
        size, patch = self.grid_size, self.patch_size
        image = patches.reshape(-1, size, size, patch, patch, self.in_channels)
        return image.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_channels, self.image_size, self.image_size)

    def _embed(
        self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """[B], [B], [B, augment_channels] -> [B, hidden]."""
        emb = self.linear1(F.silu(self.linear0(self.embed_noise(c_noise).to(dtype))))
        emb = add_augment_labels(emb, self.embed_augment, augment_labels)
        if self.embed_label is not None:
            if labels is None:
                raise ValueError(f"this network is conditional on {self.num_classes} classes, but labels is None")
            emb = emb + self.embed_label(torch.where(labels < 0, self.num_classes, labels))
        return emb


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the embedding (adaLN-Zero): [B, tokens, hidden] -> same.

    The rows of `qkv` are ordered (three, head, dim), those of `modulation` (shift, scale, gate) of the attention, then
    of the MLP, as in the paper's code.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)
        self.norm0 = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.norm1 = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)
        width = round(mlp_ratio * hidden_size)
        self.linear0, self.linear1 = nn.Linear(hidden_size, width), nn.Linear(width, hidden_size)
        self.dropout = nn.Dropout(dropout)  # masks are drawn anew at each of its three places

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """([B, tokens, hidden], [B, hidden]) -> [B, tokens, hidden]."""
        shift0, scale0, gate0, shift1, scale1, gate1 = self.modulation(emb).chunk(6, dim=1)
        x = x + gate0[:, None] * self._attend(modulate(self.norm0(x), shift0, scale0))
        hidden = F.gelu(self.linear0(modulate(self.norm1(x), shift1, scale1)), approximate="tanh")
        return x + gate1[:, None] * self.dropout(self.linear1(self.dropout(hidden)))

    def _attend(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, tokens, dim]
        out = F.scaled_dot_product_attention(query, key, value)
        return self.dropout(self.proj(out.transpose(1, 2).reshape(batch, tokens, width)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) x + shift; [B, tokens, hidden], [B, hidden], [B, hidden] -> [B, tokens, hidden]."""
    return x * (1 + scale[:, None]) + shift[:, None]


def sincos_positions(size: int, channels: int) -> np.ndarray:
    """Fixed positions of size x size tokens by rows, float32 [size * size, channels], as the paper has them.

    The first half of the channels is of the column, the second of the row, each [sin | cos] at frequencies
    10000^(-4k / channels).
    """
    freqs = 10000.0 ** (-np.arange(channels // 4) / (channels // 4))
    angles = np.outer(np.arange(size), freqs)
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [size, channels / 2]
    return np.concatenate([np.tile(line, (size, 1)), np.repeat(line, size, axis=0)], axis=1).astype(np.float32)


def _check_range(given: dict[str, Any]) -> None:
    """Refuse arguments that would fail deep inside, or make a network that is none."""

    def check(name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"network.{name} is {given[name]}; allowed: {allowed}")

    for name in ("image_size", "in_channels", "patch_size", "hidden_size", "depth", "num_heads"):
        check(name, type(given[name]) is int and given[name] >= 1, "an integer, at least 1")
    for name in ("num_classes", "augment_channels"):
        check(name, type(given[name]) is int and given[name] >= 0, "an integer, at least 0")
    for name in ("mlp_ratio", "dropout"):
        check(name, isinstance(given[name], int | float) and given[name] >= 0, "a number, at least 0")
    width, heads, image_size = given["hidden_size"], given["num_heads"], given["image_size"]
    check("dropout", given["dropout"] < 1, "a number from 0 to below 1")
    check("hidden_size", width % 4 == 0, "a multiple of 4")
    check("mlp_ratio", given["mlp_ratio"] * width >= 1, "positive, and not so small that no layer is left")
    check("patch_size", image_size % given["patch_size"] == 0, f"a divisor of data.image_size={image_size}")
    check("num_heads", width % heads == 0, f"a divisor of network.hidden_size={width}")
