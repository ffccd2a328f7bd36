"""OpenAI's `.pt` files: state dicts of `UNetModel` (openai/consistency_models), read with tensors only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from consistency.checkpoints.layouts import check_depth, described, fill, openai_modules, ratio
from consistency.io.tensors import read_state
from consistency.models.unet import UNet

HEAD_CHANNELS = 64  # of every network that OpenAI published
SMALLEST_SIZE = 8  # of their feature maps, in pixels


def read_openai(
    source: str | Path,
    *,
    image_size: int | None = None,
    head_channels: int | None = None,
    num_heads: int | None = None,
) -> UNet:
    """The network in a `.pt` file; what the file does not say is an argument.

    Args:
        source: The file.
        image_size: None for the size whose smallest feature map has 8 pixels, as in all published networks.
        head_channels: Channels per attention head; None for 64, as in all published networks.
        num_heads: Heads of every attention, for networks that fix their number instead.

    Raises:
        ValueError: if the file is not such a state dict, or does not fit the arguments.
    """
    tensors = read_state(source)
    if flat := [name for name, value in tensors.items() if name.endswith(".qkv.weight") and value.ndim == 3]:
        raise ValueError(
            f"{source} has {flat[0]} of three dimensions, as guided-diffusion's networks, whose attention rows are in "
            "another order; only those of openai/consistency_models can be read"
        )
    with described(source, "OpenAI's layout"):
        config = _config(tensors, str(source), image_size, head_channels, num_heads)
        check_depth({"name": "unet", "arguments": config}, tensors)
        network = UNet(**config)
        # The rows of qkv are in our order, although the class is called QKVAttentionLegacy (unet.py:397-438).
        fill(network, tensors, openai_modules(network), source=str(source), label_table=True)
    return network


def _config(
    tensors: dict[str, Tensor], source: str, image_size: int | None, head_channels: int | None, num_heads: int | None
) -> dict[str, Any]:
    """Arguments of our UNet, read off names and shapes."""
    _check_layout(tensors, source)
    embed = tensors["time_embed.0.weight"]
    channels, in_channels = embed.shape[1], tensors["input_blocks.0.0.weight"].shape[1]
    blocks = 1 + max(int(name.split(".")[1]) for name in tensors if re.match(r"output_blocks\.\d+\.", name))
    # A block that enlarges is an extra last child; counting them gives the number of sizes.
    enlarges = re.compile(r"output_blocks\.\d+\.[12]\.(in_layers\.2|conv)\.weight")
    levels = 1 + sum(enlarges.fullmatch(name) is not None for name in tensors)
    per_level = blocks // levels  # num_blocks + 1
    size = image_size or SMALLEST_SIZE << (levels - 1)
    firsts = [per_level * (levels - 1 - level) for level in range(levels)]  # first decoder block of each size
    widths = [tensors[f"output_blocks.{first}.0.out_layers.3.weight"].shape[0] for first in firsts]
    width = head_channels or HEAD_CHANNELS
    uneven = [w for w in (tensors[n].shape[0] for n in tensors if n.endswith(".proj_out.weight")) if w % width]
    if num_heads is None and uneven:
        raise ValueError(f"{source} has attention over {uneven[0]} channels, no multiple of head_channels={width}")
    with_attention = [f"output_blocks.{first}.1.qkv.weight" in tensors for first in firsts]
    affine = tensors["output_blocks.0.0.emb_layers.1.weight"].shape[0]
    return {
        "image_size": size,
        "in_channels": in_channels,
        "num_classes": len(tensors["label_emb.weight"]) if "label_emb.weight" in tensors else 0,
        "channels": channels,
        "channel_mult": [ratio(width, channels) for width in widths],
        "num_blocks": per_level - 1,
        "attention_resolutions": [size >> level for level in range(levels) if with_attention[level]],
        "head_channels": (head_channels or HEAD_CHANNELS) if num_heads is None else None,
        "num_heads": 1 if num_heads is None else num_heads,
        "emb_channel_mult": ratio(embed.shape[0], channels),
        "scale_shift": affine == 2 * widths[-1],
        "skip_scale": 1.0,
        "norm_eps": 1e-5,
        "norm_groups": None if min(widths) >= 128 else 32,  # from 128 channels on the two rules agree
        "conv_resample": any(re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name) for name in tensors),
        "adm": True,
    }


def _check_layout(tensors: dict[str, Tensor], source: str) -> None:
    """Refuse what is no network of OpenAI's, or one that learns its variance."""
    needed = ("input_blocks.0.0.weight", "time_embed.0.weight", "output_blocks.0.0.out_layers.3.weight", "out.2.weight")
    if lacking := [name for name in needed if name not in tensors]:
        raise ValueError(f"{source} is not a network of OpenAI's layout: it lacks {lacking[0]}")
    into, out = tensors["input_blocks.0.0.weight"].shape[1], tensors["out.2.weight"].shape[0]
    if out != into:
        raise ValueError(f"{source} predicts {out} channels from {into} (a learned variance); no such network here")
