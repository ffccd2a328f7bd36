"""`consistency-convert` and `consistency-export`: other projects' weights in, ours out. Needs no Lightning."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from consistency.checkpoints.diffusers import NOISE_SCALE, read_diffusers, save_pipeline
from consistency.checkpoints.edm import read_edm
from consistency.checkpoints.io import load_model, save_denoiser
from consistency.checkpoints.openai import read_openai
from consistency.models.denoiser import Denoiser
from consistency.models.unet import UNet

log = logging.getLogger(__name__)


def convert(cfg: DictConfig) -> Path:
    """Write a foreign network as a model folder; returns the folder."""
    source, out = Path(cfg.source), _new_folder(cfg.out)
    network, said = {"openai": _openai, "edm": _edm, "diffusers": _diffusers}[cfg.format](source, cfg)
    kind = cfg.kind or said["kind"]
    names = ("noise_scale", "sigma_data", "sigma_min", "sigma_max")
    stated = {name: cfg[name] if cfg[name] is not None else said.get(name) for name in names}
    try:
        given = {name: float(value) for name, value in stated.items() if value is not None}
        denoiser = Denoiser(network, **given)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(str(error).replace("noise.", "")) from error  # the options have no group here
    denoiser.boundary = {"consistency": denoiser.sigma_min, "edm": 0.0, "ect": said.get("boundary", 0.0)}[kind]
    info = {
        "method": "EDM" if kind == "edm" else "consistency",
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
    network, said = read_edm(source, head_channels=cfg.head_channels)
    kind = "ect" if said.get("class_name") == "ECMPrecond" else "edm"
    return network, {**said, "kind": kind, "noise_scale": 0.25}


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
    network = denoiser.network
    scalings = f"consistency scalings, identity at {denoiser.boundary}" if denoiser.boundary else "plain scalings"
    width, number = network.config["head_channels"], network.config["num_heads"]
    heads = f"heads of {width} channels" if width else f"{number} heads" if number > 1 else "one head"
    log.info(
        "%s: %s parameters, images %s, %s classes, attention at %s with %s; %s (kind=%s), c_noise = %g ln(sigma), "
        "sigma_data %g",
        out,
        f"{sum(parameter.numel() for parameter in network.parameters()):,}",
        list(denoiser.image_shape),
        network.num_classes or "no",
        network.config["attention_resolutions"],
        heads,
        scalings,
        kind,
        denoiser.noise_scale,
        denoiser.sigma_data,
    )
