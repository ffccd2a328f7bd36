"""NVlabs' EDM snapshots (`.pkl`), or a state dict with the same names: DDPM++, NCSN++ and ADM."""

from __future__ import annotations

import logging
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency.checkpoints.layouts import check_depth, described, edm_modules, fill, ratio, rows_from_head_dim_three
from consistency.checkpoints.pickles import LEGACY_MAGIC, Record, read_pickle
from consistency.io.tensors import read_state
from consistency.models.parametrization import Parametrization
from consistency.models.register import build, describe_parametrization, find
from consistency.models.table1 import IDDPM
from consistency.models.unet import UNet

log = logging.getLogger(__name__)
HEAD_CHANNELS = 64  # of DhariwalUNet
# Class of a snapshot -> our parametrization; ECT's snapshots hold the second.
PRECONDITIONING = {
    "EDMPrecond": "edm",
    "ECMPrecond": "edm",
    "VPPrecond": "vp",
    "VEPrecond": "ve",
    "iDDPMPrecond": "iddpm",
}


def read_edm(
    source: str | Path, *, head_channels: int | None = None, parametrization: Parametrization | None = None
) -> tuple[UNet, dict[str, Any]]:
    """The EMA network of a snapshot, and what the snapshot says of itself.

    Nothing in the file is executed. Its size, widths, filters, classes and augmentation labels are read off names and
    shapes; heads and dropout off the modules, where the file holds modules.

    Args:
        source: The file.
        head_channels: Channels per attention head of an ADM; None for what the file says, or 64.
        parametrization: Of `models.table1`, for a state dict, which does not say it; None for what the file says, or
            EDM's. A state dict of iDDPM is known by its levels.

    Returns:
        The network, and `class_name`, with `sigma_data` of EDM's, `boundary` of ECT's, or `parametrization` (name and
        arguments, for `register.build`), `sigma_min` and `sigma_max` of the others'; a state dict may say none of it.

    Raises:
        ValueError: if the file is not such a network, or asks for anything to be run.
    """
    with described(source, "NVlabs' layout"):
        tensors, said = _read(Path(source))
        tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
        filters = {name: tensors.pop(name) for name in list(tensors) if name.endswith("resample_filter")}
        own = _parametrization(said, tensors.pop("u", None), parametrization, str(source))
        config = _config(tensors, str(source), filters)
        if config["out_channels"] is not None and not isinstance(own, IDDPM):
            raise ValueError(
                f"{source} has {config['out_channels']} outputs for {config['in_channels']} channels, as only iDDPM's "
                "have; set parametrization=iddpm if it is one"
            )
        known = said.pop("head_channels", None) if config["adm"] else "all (one head)"
        if head_channels is not None and known not in (None, head_channels):
            raise ValueError(f"head_channels is {head_channels}; {source} says {known}; leave head_channels=null")
        if config["adm"]:
            config["head_channels"] = head_channels or known or HEAD_CHANNELS
        said.pop("head_channels", None)
        config["dropout"] = said.pop("dropout", 0.0)
        check_depth({"name": "unet", "arguments": config}, tensors)
        network = UNet(**config)
        fill(
            network,
            tensors,
            edm_modules(network),
            source=str(source),
            label_table=False,
            rows=rows_from_head_dim_three,
        )
    return network, said


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, what the file says beside them)."""
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\3\4"  # torch's newer format, complete or cut short
    if path.suffix == ".safetensors" or is_zip:
        return read_state(path), {}
    contents = read_pickle(path)
    if contents == LEGACY_MAGIC:
        return read_state(path), {}
    model = contents.get("ema") if isinstance(contents, dict) else contents
    if not isinstance(model, Record):
        raise ValueError(f"{path} holds no network under 'ema'; expected a snapshot of NVlabs/edm")
    if model.class_name not in PRECONDITIONING:
        raise ValueError(
            f"{path} holds a {model.class_name or 'module'}; this converter reads {', '.join(PRECONDITIONING)} "
            "(EDM2's networks are other models)"
        )
    said: dict[str, Any] = {"class_name": model.class_name}
    if PRECONDITIONING[model.class_name] == "edm":
        said["sigma_data"] = float(model.attributes.get("sigma_data", 0.5))
    else:
        said |= _said_of_parametrization(PRECONDITIONING[model.class_name], model.attributes)
    if model.class_name == "ECMPrecond":
        # In eval mode ECT's models are the identity at 0.003, where its loss has the identity at 0.
        said["boundary"] = float(model.attributes.get("sigma_min", 0.003))
    blocks = [module.attributes for _, module in model.modules() if "num_heads" in module.attributes]
    if heads := {block["out_channels"] // block["num_heads"] for block in blocks if block["num_heads"]}:
        said["head_channels"] = min(heads)
    if blocks:
        said["dropout"] = float(blocks[0].get("dropout", 0.0))
    return dict(model.tensors()), said


def _said_of_parametrization(name: str, attributes: dict[str, Any]) -> dict[str, Any]:
    """What the attributes of a module say, which are called as the fields of our class."""
    defaults: dict[str, Any] = {field.name: field.default for field in fields(find("parametrization", name))}
    arguments = {key: type(default)(attributes.get(key, default)) for key, default in defaults.items()}
    said: dict[str, Any] = {"parametrization": {"name": name, "arguments": arguments}}
    return said | {bound: float(attributes[bound]) for bound in ("sigma_min", "sigma_max") if bound in attributes}


def _parametrization(said: dict[str, Any], levels: Tensor | None, wanted: Any, source: str) -> Any:
    """The file's parametrization, which is put into `said`; None for EDM's.

    Args:
        said: What the file says.
        levels: `u` in the file: iDDPM's levels, by which its state dicts are known too.
        wanted: The parametrization that the caller names, or None.
        source: For messages.
    """
    own = wanted
    if "class_name" in said:
        own = build("parametrization", said["parametrization"]) if "parametrization" in said else None
        if wanted not in (None, own):
            raise ValueError(f"parametrization is {wanted}; {source} says {own or 'EDM'}; leave parametrization=null")
    elif own is None and levels is not None:
        own = IDDPM(M=len(levels) - 1)
    if levels is not None:
        # They follow from the arguments, which a state dict does not hold. Theirs were found in float32.
        expected = own.levels() if isinstance(own, IDDPM) else levels.new_zeros(0)
        if levels.shape != expected.shape or not torch.allclose(levels.double(), expected, rtol=1e-3, atol=1e-3):
            raise ValueError(f"the levels u in {source} are not those of {own or 'EDM'}")
    if own is not None:
        said["parametrization"] = describe_parametrization(own)
    return own


def _config(tensors: dict[str, Tensor], source: str, filters: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of our UNet, read off names and shapes."""
    sizes = [int(match[1]) for name in tensors if (match := re.fullmatch(r"enc\.(\d+)x\d+_conv\.weight", name))]
    if not sizes or "map_layer0.weight" not in tensors:
        raise ValueError(f"{source} is not a network of NVlabs' layout: it lacks enc.*_conv or map_layer0")
    inner = rf"dec\.(?!{sizes[0]}x)\d+x\d+_aux_norm\."
    if skip := [name for name in tensors if re.search(rf"_aux_(down|skip|up)\.|{inner}", name)]:
        raise ValueError(f"{source} has {skip[0]}, of an encoder or decoder of type 'skip'; no such network here")
    size, adm = sizes[0], "out_conv.weight" in tensors
    stem, embed = tensors[f"enc.{size}x{size}_conv.weight"], tensors["map_layer0.weight"]
    channels, in_channels = embed.shape[1] if adm else stem.shape[0], stem.shape[1]
    resolutions = sorted(
        {int(match[1]) for name in tensors if (match := re.match(r"enc\.(\d+)x\d+_block0\.", name))}, reverse=True
    )
    widths = [tensors[f"enc.{r}x{r}_block0.conv1.weight"].shape[0] for r in resolutions]
    count = sum(re.fullmatch(rf"enc\.{size}x{size}_block\d+\.conv0\.weight", name) is not None for name in tensors)
    labels, augment = tensors.get("map_label.weight"), tensors.get("map_augment.weight")
    last = tensors.get("out_conv.weight" if adm else f"dec.{size}x{size}_aux_conv.weight")
    pyramid = any("_aux_residual." in name for name in tensors)
    affine = tensors[f"enc.{size}x{size}_block0.affine.weight"]
    return {
        "image_size": size,
        "in_channels": in_channels,
        "out_channels": None if last is None or len(last) == in_channels else len(last),
        "num_classes": 0 if labels is None else labels.shape[1],
        "channels": channels,
        "channel_mult": [ratio(width, channels) for width in widths],
        "num_blocks": count,
        "attention_resolutions": [r for r in resolutions if f"enc.{r}x{r}_block0.qkv.weight" in tensors],
        "fourier_scale": 16.0 if "map_noise.freqs" in tensors else None,  # what drew the frequencies; they come along
        "noise_channel_mult": ratio(embed.shape[1], channels),
        "emb_channel_mult": ratio(embed.shape[0], channels),
        "scale_shift": affine.shape[0] == 2 * widths[0],
        "skip_scale": 1.0 if adm else 0.5**0.5,
        "resample_filter": _taps(filters) or ([1, 3, 3, 1] if pyramid else [1, 1]),
        "norm_eps": 1e-5 if adm else 1e-6,
        "input_pyramid": pyramid,
        "augment_channels": 0 if augment is None else augment.shape[1],
        "adm": adm,
    }


def _taps(filters: dict[str, Tensor]) -> list[float]:
    """The taps of the file's resampling filters, which are outer products of sum 1; empty if it holds none."""
    if not filters:
        return []
    row = next(iter(filters.values())).double()[0, 0].sum(0)
    taps = (row / row[row != 0].abs().min()).tolist()
    whole = all(abs(tap - round(tap)) < 1e-3 for tap in taps)
    return [round(tap) for tap in taps] if whole else row.tolist()
