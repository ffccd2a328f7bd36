"""diffusers' `ConsistencyModelPipeline` folders: `UNet2DModel` and `CMStochasticIterativeScheduler`, in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consistency.checkpoints.layouts import check_depth, described, diffusers_modules, fill, ratio
from consistency.io.safe_load import first_line, read_json
from consistency.io.tensors import read_state
from consistency.models.denoiser import Denoiser
from consistency.models.layers import SelfAttention
from consistency.models.parametrization import EDM
from consistency.models.unet import UNet

NOISE_SCALE = 250.0  # the scheduler hands the network 1000 * 0.25 ln(sigma), always
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# (down, up) -> (attention, strided convolutions between the sizes; None where downsample_type says it)
_BLOCKS: dict[tuple[str, str], tuple[bool, bool | None]] = {
    ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"): (False, False),
    ("DownBlock2D", "UpBlock2D"): (False, True),
    ("AttnDownBlock2D", "AttnUpBlock2D"): (True, None),
}
# What UNet2DModel can be and our UNet cannot: setting -> the only value that is read.
_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "add_attention": True,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "time_embedding_type": "positional",
}


def read_diffusers(source: str | Path) -> tuple[UNet, dict[str, Any]]:
    """The network of a pipeline folder, and the noise settings of its scheduler; diffusers itself is not needed.

    Raises:
        ValueError: if the folder is not such a pipeline, or its network is one that our UNet cannot be.
    """
    folder = Path(source)
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", folder)
    config = _read_json(folder / "unet" / "config.json", folder)
    if scheduler.get("_class_name") != "CMStochasticIterativeScheduler" or config.get("_class_name") != "UNet2DModel":
        raise ValueError(
            f"{folder} holds a {config.get('_class_name')} and a {scheduler.get('_class_name')}; expected the "
            "UNet2DModel and CMStochasticIterativeScheduler of a ConsistencyModelPipeline"
        )
    weights = next((folder / "unet" / name for name in WEIGHTS if (folder / "unet" / name).exists()), None)
    if weights is None:
        raise ValueError(f"{folder / 'unet'} has no weights; expected {' or '.join(WEIGHTS)}")
    tensors = read_state(weights)
    with described(folder, "a diffusers pipeline"):
        tensors = _stack_qkv(tensors)
        ours = _our_config(config, str(folder))
        check_depth({"name": "unet", "arguments": ours}, tensors)
        network = UNet(**ours)
        fill(network, tensors, diffusers_modules(network), source=str(weights), label_table=True)
    return network, {name: scheduler.get(name) for name in ("sigma_data", "sigma_min", "sigma_max")}


def save_pipeline(denoiser: Denoiser, folder: str | Path, *, num_levels: int = 40) -> Path:
    """Write a `ConsistencyModelPipeline` that draws our images from our noise.

    The scheduler does not clip between evaluations, as our samplers do not.

    Args:
        denoiser: A consistency model with an ADM network.
        folder: Where to write.
        num_levels: Grid from which the pipeline's `timesteps=[22, 0]` picks levels (`num_train_timesteps`).

    Raises:
        ValueError: if diffusers cannot hold the model, with the reason, or is not installed.
    """
    config = _their_config(denoiser)
    try:
        from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
    except ImportError as error:
        raise ValueError("format=diffusers needs the package diffusers: pip install 'consistency[export]'") from error
    unet = UNet2DModel(**config)
    modules = diffusers_modules(denoiser.network)  # type: ignore[arg-type]
    state = {f"{modules[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in _weights(denoiser.network)}
    theirs = unet.state_dict()
    unet.load_state_dict({key: value.reshape(theirs[key].shape) for key, value in _split_qkv(state).items()})
    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=num_levels,
        sigma_min=denoiser.sigma_min,
        sigma_max=denoiser.sigma_max,
        sigma_data=getattr(denoiser.parametrization, "sigma_data", 0.5),
        clip_denoised=False,
    )
    ConsistencyModelPipeline(unet.eval(), scheduler).save_pretrained(folder)
    return Path(folder)


def _our_config(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Arguments of our UNet from a config.json; keys that are not there have diffusers' defaults."""
    for key, only in _FIXED.items():
        if config.get(key, only) != only:
            raise ValueError(f"{source}: the network has {key}={config[key]}; only {key}={only} can be read")
    middle, others = config.get("attn_norm_num_groups"), config.get("norm_num_groups", 32)
    if middle not in (None, others):
        raise ValueError(f"{source}: attn_norm_num_groups is {middle}; only norm_num_groups={others} can be read")
    widths, pairs = (
        config["block_out_channels"],
        list(zip(config["down_block_types"], reversed(config["up_block_types"]), strict=True)),
    )
    if unknown := [pair for pair in pairs if tuple(pair) not in _BLOCKS]:
        raise ValueError(f"{source}: the network has blocks {' and '.join(unknown[0])}; no such pair can be read")
    strided = config.get("downsample_type", "conv") == "conv"
    kinds = [_BLOCKS[pair] for pair in pairs]
    between = {strided if kind[1] is None else kind[1] for kind in kinds[:-1]}
    if len(between) > 1 or config.get("upsample_type", "conv") != config.get("downsample_type", "conv"):
        raise ValueError(f"{source}: the network resamples in two ways; only one can be read")
    if config.get("out_channels", 3) != config.get("in_channels", 3) or not isinstance(config.get("sample_size"), int):
        raise ValueError(f"{source}: images in and out must be square and of as many channels")
    channels, size, groups = widths[0], config["sample_size"], config.get("norm_num_groups", 32)
    return {
        "image_size": size,
        "in_channels": config.get("in_channels", 3),
        "num_classes": config.get("num_class_embeds") or 0,
        "channels": channels,
        "channel_mult": [ratio(width, channels) for width in widths],
        "num_blocks": config.get("layers_per_block", 2),
        "attention_resolutions": [size >> level for level, kind in enumerate(kinds) if kind[0]],
        "head_channels": config.get("attention_head_dim", 8),
        "dropout": config.get("dropout", 0.0),
        "emb_channel_mult": ratio(config.get("time_embedding_dim") or 4 * channels, channels),
        "scale_shift": config.get("resnet_time_scale_shift", "default") == "scale_shift",
        "skip_scale": 1.0,
        "norm_eps": config.get("norm_eps", 1e-5),
        "norm_groups": None if groups == 32 and min(widths) >= 128 else groups,
        "conv_resample": bool(between) and between == {True},
        "adm": True,
    }


def _check_exportable(denoiser: Denoiser, own: dict[str, Any], groups: set[int], heads: set[int]) -> None:
    """Refuse a model that diffusers cannot hold, with the first reason.

    Args:
        denoiser: With a UNet.
        own: Arguments of the UNet.
        groups: Numbers of groups of its norms.
        heads: Widths of its attention heads.
    """
    parametrization = denoiser.parametrization
    noise_scale = getattr(parametrization, "noise_scale", None)
    reasons = {
        "its networks are ADM, this one is a DDPM++ or NCSN++ (network.adm=false)": not own["adm"],
        f"its scheduler has EDM's parametrization, this model has {type(parametrization).__name__}": (
            not isinstance(parametrization, EDM)
        ),
        f"its scheduler feeds the network 250 ln(sigma), this model has noise_scale {noise_scale}": (
            noise_scale != NOISE_SCALE
        ),
        f"its scheduler makes the model the identity at sigma_min={denoiser.sigma_min:g}, this one is it at "
        f"{denoiser.boundary:g} (a diffusion model, or ECT)": denoiser.boundary != denoiser.sigma_min,
        f"it has no skip_scale, this network has {own['skip_scale']:g}": own["skip_scale"] != 1,
        "it has no Fourier embedding of a chosen scale": own["fourier_scale"] is not None,
        "it has no input pyramid": own["input_pyramid"],
        "it has no augmentation labels": own["augment_channels"] > 0,
        f"its filter is (1, 1), not {own['resample_filter']}": own["resample_filter"] != [1, 1],
        "its noise embedding is as long as the first width": own["noise_channel_mult"] != 1,
        "its first width is that of the stem (channel_mult starts with 1)": own["channel_mult"][0] != 1,
        f"its norms have one number of groups, these have {sorted(groups)} (train with 128 channels or more, or with "
        "network.norm_groups=32)": len(groups) > 1,
        f"its attention heads have one width, these have {sorted(heads)}": len(heads) > 1,
    }
    if reason := next((text for text, holds in reasons.items() if holds), None):
        raise ValueError(f"diffusers cannot hold this model: {reason}; use format=safetensors")


def _their_config(denoiser: Denoiser) -> dict[str, Any]:
    """Arguments of UNet2DModel, or the reason why there are none."""
    network = denoiser.network
    if not isinstance(network, UNet):
        kind = type(network).__name__
        raise ValueError(
            f"diffusers cannot hold this model: its network is a {kind}, not a UNet; use format=safetensors"
        )
    own = network.config
    groups = {module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)}
    attentions = [module for module in network.modules() if isinstance(module, SelfAttention)]
    heads = {attention.proj.in_channels // attention.num_heads for attention in attentions}
    _check_exportable(denoiser, own, groups, heads)
    sizes = [own["image_size"] >> level for level in range(len(own["channel_mult"]))]
    names = {kind: pair for pair, kind in _BLOCKS.items()}
    without = names[False, own["conv_resample"]]
    pairs = [names[True, None] if size in own["attention_resolutions"] else without for size in sizes]
    resample = "conv" if own["conv_resample"] else "resnet"
    config = {
        "sample_size": own["image_size"],
        "in_channels": own["in_channels"],
        "out_channels": own["in_channels"],
        "down_block_types": [down for down, _ in pairs],
        "up_block_types": [up for _, up in reversed(pairs)],
        "block_out_channels": [round(mult * own["channels"]) for mult in own["channel_mult"]],
        "layers_per_block": own["num_blocks"],
        "downsample_type": resample,
        "upsample_type": resample,
        "dropout": own["dropout"],
        "attention_head_dim": heads.pop(),
        "norm_num_groups": next(iter(groups)),
        "attn_norm_num_groups": next(iter(groups)),
        "norm_eps": own["norm_eps"],
        "resnet_time_scale_shift": "scale_shift" if own["scale_shift"] else "default",
        "num_class_embeds": own["num_classes"] or None,
    }
    if own["emb_channel_mult"] != 4:
        config["time_embedding_dim"] = round(own["emb_channel_mult"] * own["channels"])
    return config


def _weights(network: nn.Module) -> list[tuple[str, Tensor]]:
    """Our state dict with the label embedding as a table [classes, channels]."""
    state = network.state_dict()
    return [(key, value.T if key == "embed_label.weight" else value) for key, value in state.items()]


def _stack_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`to_q`, `to_k`, `to_v` -> `to_qkv`, rows ordered (three, head, dim)."""
    stacked = dict(tensors)
    for name in tensors:
        if ".to_q." in name:
            parts = [stacked.pop(name.replace(".to_q.", f".to_{part}."), torch.empty(0)) for part in "qkv"]
            stacked[name.replace(".to_q.", ".to_qkv.")] = torch.cat(parts)
    return stacked


def _split_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `_stack_qkv`."""
    split = dict(tensors)
    for name in tensors:
        if ".to_qkv." in name:
            for part, value in zip("qkv", split.pop(name).chunk(3), strict=True):
                split[name.replace(".to_qkv.", f".to_{part}.")] = value
    return split


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        contents = read_json(path)
    except FileNotFoundError:
        what = f"{path.relative_to(folder)} is missing"
        raise ValueError(f"{folder} is not a pipeline folder of diffusers: {what}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} is not a table of settings")
    return contents
