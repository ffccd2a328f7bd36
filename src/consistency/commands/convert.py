"""`consistency-convert` and `consistency-export`: other projects' weights in, ours out. Needs no Lightning."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from consistency.checkpoints.diffusers import NOISE_SCALE, read_diffusers, save_pipeline
from consistency.checkpoints.edm import read_edm
from consistency.checkpoints.native import load_model, save_denoiser
from consistency.checkpoints.openai import read_openai
from consistency.models.denoiser import Denoiser
from consistency.models.parametrization import EDM
from consistency.models.register import build
from consistency.models.table1 import VP
from consistency.models.unet import UNet
from consistency.noise.grids import SIGMA_MIN

log = logging.getLogger(__name__)


def convert(cfg: DictConfig) -> Path:
    """Write a foreign network as a model folder; returns the folder."""
    source, out = Path(cfg.source), _new_folder(cfg.out)
    if cfg.format != "edm" and "parametrization" in cfg:
        raise ValueError(f"parametrization is given; allowed: null with format={cfg.format}")
    network, said = {"openai": _openai, "edm": _edm, "diffusers": _diffusers}[cfg.format](source, cfg)
    kind = cfg.kind or said["kind"]
    names = ("noise_scale", "sigma_data", "sigma_min", "sigma_max")
    stated = {name: cfg[name] if cfg[name] is not None else said.get(name) for name in names}
    given = {name: float(value) for name, value in stated.items() if value is not None}
    levels = {name: given.pop(name) for name in ("sigma_min", "sigma_max") if name in given}
    boundary = {"edm": 0.0, "ect": said.get("boundary", 0.0), "consistency": levels.get("sigma_min", SIGMA_MIN)}[kind]
    described = said.get("parametrization")
    if described is not None and given:
        raise ValueError(f"{next(iter(given))} is given; allowed: null, parametrization {described['name']} has none")
    try:
        denoiser = Denoiser(
            network,
            EDM(boundary=boundary, **given) if described is None else build("parametrization", described),
            kind="diffusion" if kind == "edm" else "consistency",
            **levels,
        )
    except ValueError as error:  # the options have no group here
        raise ValueError(re.sub(r"\b(model|data|parametrization)\.", "", str(error))) from error
    info = {
        "weights": "imported",
        "imported": {"format": cfg.format, "source": source.name, "sha256": _digest(source)},
    }
    try:
        save_denoiser(denoiser, out, info)
    except OSError as error:
        raise ValueError(f"out={out} cannot be written: {error.strerror}") from error
    _say(denoiser, kind, out)
    return out


def _openai(source: Path, cfg: DictConfig) -> tuple[UNet, dict[str, Any]]:
    """The file does not say which scalings it was trained with; the published names do."""
    network = read_openai(source, image_size=cfg.image_size, head_channels=cfg.head_channels, num_heads=cfg.num_heads)
    kind = "edm" if source.name.lower().startswith("edm") else "consistency"
    return network, {"kind": kind, "noise_scale": 250.0}


def _edm(source: Path, cfg: DictConfig) -> tuple[UNet, dict[str, Any]]:
    network, said = read_edm(source, head_channels=cfg.head_channels, parametrization=_wanted(cfg))
    if "parametrization" in said:
        low, high = build("parametrization", said["parametrization"]).own_range()
        said = {"sigma_min": low, "sigma_max": high, **said, "kind": "edm"}
        if said["parametrization"]["name"] == "iddpm":  # its file says u_0, from which nobody samples
            said["sigma_max"] = min(said["sigma_max"], high)
        return network, said
    kind = "ect" if said.get("class_name") == "ECMPrecond" else "edm"
    return network, {**said, "kind": kind, "noise_scale": 0.25}


def _wanted(cfg: DictConfig) -> Any:
    """`parametrization=`, or None."""
    if "parametrization" not in cfg:
        return None
    target = str(cfg.parametrization.get("_target_"))
    if target.rpartition(".")[0] != VP.__module__:  # EDM's takes its sigma_data from the data, of which there are none
        raise ValueError(f"parametrization is {target.rpartition('.')[2]}; allowed: vp, ve, iddpm, or null for EDM's")
    return instantiate(cfg.parametrization)


def _diffusers(source: Path, cfg: DictConfig) -> tuple[UNet, dict[str, Any]]:
    network, said = read_diffusers(source)
    return network, {**said, "kind": "consistency", "noise_scale": NOISE_SCALE}


def export(cfg: DictConfig) -> Path:
    """Write a trained model as a model folder or as a diffusers pipeline; returns the folder."""
    denoiser, info = load_model(cfg.ckpt, cfg.weights)
    out = _new_folder(cfg.out)
    if cfg.format == "diffusers":
        save_pipeline(denoiser, out, num_levels=cfg.num_levels)
    else:
        save_denoiser(denoiser, out, info)
    log.info("%s (weights %s) -> %s, as %s", cfg.ckpt, info.get("weights"), out, cfg.format)
    return out


def _new_folder(name: str) -> Path:
    out = Path(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out} exists and is not an empty folder; name a new one")
    return out


def _digest(source: Path) -> str:
    """sha256 of a file, or of the files of a folder in the order of their names."""
    digest = hashlib.sha256()
    for file in [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _say(denoiser: Denoiser, kind: str, out: Path) -> None:
    """What the folder holds; above all what was assumed, because the file did not say it."""
    network: Any = denoiser.network
    given: Any = denoiser.parametrization
    if isinstance(given, EDM):
        details = f"c_noise = {given.noise_scale:g} ln(sigma), sigma_data {given.sigma_data:g}"
    else:
        details = f"{given}, levels {denoiser.sigma_min:g} to {denoiser.sigma_max:g}"
    scalings = f"consistency scalings, identity at {denoiser.boundary}" if denoiser.boundary else "plain scalings"
    width, number = network.config["head_channels"], network.config["num_heads"]
    heads = f"heads of {width} channels" if width else f"{number} heads" if number > 1 else "one head"
    log.info(
        "%s: %s parameters, images %s, %s classes, attention at %s with %s; %s (kind=%s), %s",
        out,
        f"{sum(parameter.numel() for parameter in network.parameters()):,}",
        list(denoiser.image_shape),
        network.num_classes or "no",
        network.config["attention_resolutions"],
        heads,
        scalings,
        kind,
        details,
    )
