"""Names of the UNet's modules in other projects' files: our module -> theirs, and the order of attention rows.

One table a project; importers and the exporter read the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from consistency.io.safe_load import first_line
from consistency.models.layers import ConvResample, ResidualBlock
from consistency.models.register import find
from consistency.models.unet import UNet


class BlockNames(NamedTuple):
    """How another project calls the parts of a residual block, of its attention, and of a resampling convolution."""

    residual: dict[str, str]
    attention: dict[str, str]
    resample: str = "conv"


OPENAI = BlockNames(
    {
        "norm0": "in_layers.0",
        "conv0": "in_layers.2",
        "affine": "emb_layers.1",
        "norm1": "out_layers.0",
        "conv1": "out_layers.3",
        "skip": "skip_connection",
    },
    {"norm": "norm", "qkv": "qkv", "proj": "proj_out"},
)
EDM = BlockNames(
    {name: name for name in ("norm0", "conv0", "affine", "norm1", "conv1", "skip")},
    {"norm": "norm2", "qkv": "qkv", "proj": "proj"},
)
DIFFUSERS = BlockNames(
    {
        "norm0": "norm1",
        "conv0": "conv1",
        "affine": "time_emb_proj",
        "norm1": "norm2",
        "conv1": "conv2",
        "skip": "conv_shortcut",
    },
    {"norm": "group_norm", "qkv": "to_qkv", "proj": "to_out.0"},  # to_qkv: its to_q, to_k, to_v stacked
)


def openai_modules(network: UNet) -> dict[str, str]:
    """Module names in OpenAI's `UNetModel` (openai/consistency_models, guided-diffusion)."""
    names = {
        "linear0": "time_embed.0",
        "linear1": "time_embed.2",
        "embed_label": "label_emb",
        "stem": "input_blocks.0.0",
        "out_norm": "out.0",
        "out_conv": "out.2",
    }
    for index, block in enumerate(network.encoder):
        # Its strided convolution is `op` on the way down and `conv` on the way up.
        style = OPENAI._replace(resample="op")
        names |= _block(f"encoder.{index}", block, f"input_blocks.{index + 1}.0", f"input_blocks.{index + 1}.1", style)
    names |= _block("middle.0", network.middle[0], "middle_block.0", "middle_block.1", OPENAI)
    names |= _block("middle.1", network.middle[1], "middle_block.2", "", OPENAI)
    position, children = -1, 0
    for index, (block, takes_skip) in enumerate(zip(network.decoder, network.takes_skip, strict=True)):
        if takes_skip:
            position, children = position + 1, 0
        prefix = f"output_blocks.{position}"  # a block that enlarges is the last child of the one before it
        names |= _block(f"decoder.{index}", block, f"{prefix}.{children}", f"{prefix}.{children + 1}", OPENAI)
        children += 2 if getattr(block, "attention", None) is not None else 1
    return names


def edm_modules(network: UNet) -> dict[str, str]:
    """Module names in NVlabs/edm's `SongUNet` and `DhariwalUNet`."""
    size = network.image_size
    out = ("out_norm", "out_conv") if network.adm else (f"dec.{size}x{size}_aux_norm", f"dec.{size}x{size}_aux_conv")
    names = {
        "embed_noise": "map_noise",
        "embed_label": "map_label",
        "embed_augment": "map_augment",
        "linear0": "map_layer0",
        "linear1": "map_layer1",
        "stem": f"enc.{size}x{size}_conv",
        "out_norm": out[0],
        "out_conv": out[1],
    }
    level = 0
    for index, (block, shrinks) in enumerate(zip(network.encoder, network.shrinks, strict=True)):
        if shrinks:
            size, count = size // 2, 0
            names |= {f"pyramid.{level}.conv": f"enc.{size}x{size}_aux_residual"}
            level += 1
        elif index == 0:
            count = 0
        theirs = f"enc.{size}x{size}_{'down' if shrinks else f'block{count}'}"
        count += 0 if shrinks else 1
        names |= _block(f"encoder.{index}", block, theirs, theirs, EDM)
    for index, block in enumerate(network.middle):
        theirs = f"dec.{size}x{size}_in{index}"
        names |= _block(f"middle.{index}", block, theirs, theirs, EDM)
    count = 0
    for index, (block, takes_skip) in enumerate(zip(network.decoder, network.takes_skip, strict=True)):
        if not takes_skip:
            size, count = size * 2, 0
        theirs = f"dec.{size}x{size}_{f'block{count}' if takes_skip else 'up'}"
        count += 1 if takes_skip else 0
        names |= _block(f"decoder.{index}", block, theirs, theirs, EDM)
    return names


def diffusers_modules(network: UNet) -> dict[str, str]:
    """Module names in diffusers' `UNet2DModel`, with `to_q`, `to_k` and `to_v` stacked as `to_qkv`."""
    names = {
        "linear0": "time_embedding.linear_1",
        "linear1": "time_embedding.linear_2",
        "embed_label": "class_embedding",
        "stem": "conv_in",
        "out_norm": "conv_norm_out",
        "out_conv": "conv_out",
    }
    level = count = 0
    for index, (block, shrinks) in enumerate(zip(network.encoder, network.shrinks, strict=True)):
        prefix = f"down_blocks.{level}"
        theirs = f"{prefix}.downsamplers.0" if shrinks else f"{prefix}.resnets.{count}"
        names |= _block(f"encoder.{index}", block, theirs, f"{prefix}.attentions.{count}", DIFFUSERS)
        level, count = (level + 1, 0) if shrinks else (level, count + 1)
    for index, block in enumerate(network.middle):
        names |= _block(f"middle.{index}", block, f"mid_block.resnets.{index}", "mid_block.attentions.0", DIFFUSERS)
    level = count = 0
    for index, (block, takes_skip) in enumerate(zip(network.decoder, network.takes_skip, strict=True)):
        prefix = f"up_blocks.{level}"
        theirs = f"{prefix}.resnets.{count}" if takes_skip else f"{prefix}.upsamplers.0"
        names |= _block(f"decoder.{index}", block, theirs, f"{prefix}.attentions.{count}", DIFFUSERS)
        level, count = (level, count + 1) if takes_skip else (level + 1, 0)
    return names


def _block(ours: str, block: nn.Module, theirs: str, their_attention: str, style: BlockNames) -> dict[str, str]:
    """Names of the leaf modules of one block."""
    if isinstance(block, ConvResample):
        return {f"{ours}.conv": f"{theirs}.{style.resample}"}
    names = {f"{ours}.{mine}": f"{theirs}.{name}" for mine, name in style.residual.items()}
    if isinstance(block, ResidualBlock) and block.attention is not None:
        names |= {f"{ours}.attention.{mine}": f"{their_attention}.{name}" for mine, name in style.attention.items()}
    return names


def fill(
    network: UNet,
    tensors: Mapping[str, Tensor],
    modules: dict[str, str],
    *,
    source: str,
    label_table: bool,
    rows: Callable[[Tensor, int], Tensor] | None = None,
) -> None:
    """Give the network the weights of a foreign state dict: every tensor is used, and every tensor is there.

    Args:
        network: Built to match.
        tensors: Foreign name -> tensor, constants taken out.
        modules: Our module -> theirs.
        source: The file, for messages.
        label_table: Whether labels are embedded by a table [classes, channels], the transpose of our linear layer.
        rows: `(qkv rows, heads) -> rows` in our order (three, head, dim); None where the order is ours already.

    Raises:
        ValueError: if a tensor is missing, left over, of another shape, or holds NaN or infinity.
    """
    wanted = {key: f"{modules[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}" for key in network.state_dict()}
    missing, left = sorted(set(wanted.values()) - set(tensors)), sorted(set(tensors) - set(wanted.values()))
    if missing or left:
        what = f"it lacks {_some(missing)}" if missing else f"nothing takes {_some(left)}"
        raise ValueError(f"{source} is not a network of this layout: {what}")
    state = {}
    for ours, own in network.state_dict().items():
        theirs = tensors[wanted[ours]].detach().float()
        if ours == "embed_label.weight" and label_table and theirs.ndim == 2:
            theirs = theirs.T
        is_qkv = ".attention.qkv." in ours
        if theirs.numel() != own.numel() or (theirs.ndim > 1 and theirs.shape[:2] != own.shape[:2]):
            raise ValueError(
                f"{source}: {wanted[ours]} is {list(theirs.shape)}, the network needs {list(own.shape)}; "
                "check image_size and head_channels"
            )
        if not theirs.isfinite().all():
            raise ValueError(
                f"{source}: {wanted[ours]} holds NaN or infinity; the file is damaged, or its run diverged"
            )
        # 1x1 convolutions are also kept as [out, in] and [out, in, 1].
        theirs = theirs.reshape(own.shape)
        if is_qkv and rows is not None:
            attention: Any = network.get_submodule(ours.rpartition(".qkv.")[0])
            theirs = rows(theirs, attention.num_heads)
        state[ours] = theirs.contiguous()
    network.load_state_dict(state)


def check_depth(description: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Refuse settings of a network of this package with more blocks than it has tensors: building it may never end.

    Args:
        description: Name and arguments of a registered network; wrong types fail with whatever error they cause.
        tensors: By name.

    Raises:
        ValueError: with both numbers.
    """
    arguments = description["arguments"]
    if not find("network", description["name"]).__module__.startswith("consistency."):
        return  # its arguments may mean something else
    blocks = len(arguments.get("channel_mult", [1])) * max(arguments.get(name, 0) for name in ("num_blocks", "depth"))
    if not blocks <= len(tensors) + 1:  # each has several tensors
        raise ValueError(f"its settings ask for {blocks:,} blocks, it holds {len(tensors):,} tensors")


def ratio(width: int, channels: int) -> int | float:
    """A width as a multiple of the base width, whole where it is."""
    return width // channels if width % channels == 0 else width / channels


@contextmanager
def described(source: str | Path, layout: str) -> Iterator[None]:
    """Every failure to read a foreign file becomes one line that names the file."""
    try:
        yield
    except ValueError as error:
        what = str(error)
        if what.startswith("network.") or "; change " in what:  # names options of training, which a converter has not
            what = what.partition("; change ")[0].removeprefix("network.").replace("data.", "")
            raise ValueError(f"{source}: {what}; check image_size, head_channels, num_heads") from error
        if str(source) in what:
            raise
        raise ValueError(f"{source} is not a network of {layout}: {first_line(error)}") from error
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{source} is not a network of {layout}: {what}") from error


def _some(names: list[str]) -> str:
    return ", ".join(name[:80] for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def rows_from_head_dim_three(rows: Tensor, num_heads: int) -> Tensor:
    """qkv rows (head, dim, three) of NVlabs/edm -> ours, (three, head, dim)."""
    return rows.reshape(num_heads, -1, 3, *rows.shape[1:]).movedim(2, 0).reshape(rows.shape)
