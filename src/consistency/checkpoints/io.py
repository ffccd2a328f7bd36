"""Save and load a denoiser: a folder with `model.safetensors` and `config.json`, a run directory, or a `.ckpt`."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency.checkpoints.tensors import what_torch_said
from consistency.files import CHECKPOINT, MODEL_FOLDER
from consistency.models.denoiser import Denoiser

FORMAT = 2  # 1: as 2, but a Fourier embedding had its halves the other way round


def save_denoiser(
    denoiser: Denoiser, folder: str | Path, info: dict[str, Any], weights: dict[str, Tensor] | None = None
) -> Path:
    """Write a model folder: the network's weights, how to build it, and where it comes from.

    Args:
        denoiser: The model.
        folder: Made if it is missing.
        info: Plain values that say what this is: method, name of the weights, images seen, ...
        weights: Parameters of the denoiser that replace its own, e.g. an average.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value for key, value in denoiser.state_dict().items() if isinstance(value, Tensor)}
    tensors |= weights or {}
    tensors = {key.removeprefix("network."): value.detach().cpu().contiguous() for key, value in tensors.items()}
    text = json.dumps({"format": FORMAT, "denoiser": denoiser.config, "info": info}, indent=2)
    save_file(tensors, folder / "model.safetensors.partial")
    (folder / "config.json.partial").write_text(text + "\n")
    # safetensors makes files that only their owner can read.
    shutil.copymode(folder / "config.json.partial", folder / "model.safetensors.partial")
    for name in ("model.safetensors", "config.json"):
        os.replace(folder / f"{name}.partial", folder / name)
    return folder


def load_denoiser(source: str | Path, weights: str | None = None) -> Denoiser:
    """A denoiser in eval mode, on the CPU; see `load_model`."""
    return load_model(source, weights)[0]


def load_model(source: str | Path, weights: str | None = None) -> tuple[Denoiser, dict[str, Any]]:
    """A denoiser in eval mode, on the CPU, and the `info` it was saved with.

    Args:
        source: A run directory, a model folder, or a `.ckpt` file of a run.
        weights: `raw` or an average such as `ema0.999`. None takes what was exported, and from a checkpoint the first
            average.

    Raises:
        ValueError: if there is no model at `source`, or not these weights.
    """
    source = Path(source)
    exported = source / MODEL_FOLDER / "config.json"
    if exported.exists() and (weights is None or not (source / CHECKPOINT).exists()):
        source = source / MODEL_FOLDER
    if source.is_dir() and (source / "config.json").exists():
        return _load_folder(source, weights)
    if source.is_dir() and (source / CHECKPOINT).exists():
        source = source / CHECKPOINT
    if source.is_file() and source.suffix == ".ckpt":
        return _load_checkpoint(source, weights)
    what = "has no model/, config.json or checkpoints/last.ckpt" if source.exists() else "does not exist"
    raise ValueError(
        f"no model at {source}: it {what}; expected a run directory, a model folder (model.safetensors, config.json) "
        "or a .ckpt file of a run"
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint of a run: tensors and plain containers."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocols of other people's pickles
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged zip files and pickles fail in every way
        what = what_torch_said(error)
        raise ValueError(f"{path} is not a readable checkpoint of this project: {what}") from error


def _load_folder(folder: Path, weights: str | None) -> tuple[Denoiser, dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the model folder {folder} is damaged or not complete: {reason}") from error
    with _described(f"the model folder {folder}"):
        turned = stored.get("format") == 1 and stored["denoiser"]["network"].get("fourier_scale") is not None
        info = dict(stored.get("info", {}))
    if stored.get("format") not in (1, FORMAT) or turned:
        raise ValueError(f"{folder / 'config.json'} has format {stored.get('format')!r}, this version reads {FORMAT}")
    if weights not in (None, info.get("weights")):
        raise ValueError(
            f"{folder} holds the weights {info.get('weights')}, not {weights}; load the run's .ckpt instead"
        )
    with _described(f"the model folder {folder}"):
        denoiser = Denoiser.from_config(stored["denoiser"])
        denoiser.network.load_state_dict(tensors)
    return denoiser.eval(), info


@contextmanager
def _described(source: str) -> Iterator[None]:
    """Settings or tensors that do not make a model end in one line."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        what = " ".join(line.strip() for line in str(error).splitlines()[:2])  # torch's first line says nothing
        raise ValueError(
            f"{source} cannot be loaded: {what[:200]}; it was changed, or written by another version"
        ) from error


def _load_checkpoint(path: Path, weights: str | None) -> tuple[Denoiser, dict[str, Any]]:
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("state_dict", {}) if isinstance(checkpoint, dict) else {}
    config = state.get("denoiser._extra_state")
    if config is None:
        raise ValueError(f"{path} is a checkpoint, but not of a method of this project: it holds no denoiser")
    averages = checkpoint.get("callbacks", {}).get("WeightEMA", {}).get("averages", {})
    weights = weights or next(iter(averages), "raw")
    if weights != "raw" and weights not in averages:
        raise ValueError(f"{path} holds the weights {['raw', *averages]}, not {weights}")
    prefix = "denoiser."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    with _described(str(path)):
        denoiser = Denoiser.from_config(config)
        denoiser.load_state_dict(own | averages.get(weights, {}))
    info = {**checkpoint.get("consistency", {}), "weights": weights, **state.get("progress._extra_state", {})}
    info.pop("config", None)
    return denoiser.eval(), info
