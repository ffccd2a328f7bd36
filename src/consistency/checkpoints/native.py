"""Save and load a denoiser: a folder with `model.safetensors` and `config.json`, a run directory, or a `.ckpt`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from consistency.checkpoints.layouts import check_depth
from consistency.io.atomic import verify_zip, write_text
from consistency.io.run_dir import CHECKPOINT, MODEL_FOLDER
from consistency.io.safe_load import first_line, read_json
from consistency.io.tensors import load_torch, read_state, write_safetensors
from consistency.models.denoiser import Denoiser
from consistency.models.legacy import upgrade_config
from consistency.models.register import UnknownNameError

FORMAT = 3  # 2: other words, see models.legacy. 1: as 2, but a Fourier embedding had its halves the other way round


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
    folder = Path(folder)
    tensors = {key: value for key, value in denoiser.state_dict().items() if isinstance(value, Tensor)}
    tensors |= weights or {}
    tensors = {key.removeprefix("network."): value for key, value in tensors.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    text = json.dumps({"format": FORMAT, "denoiser": denoiser.config, "info": info}, indent=2)
    write_text(folder / "config.json", text + "\n")
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
    """The contents of a checkpoint of a run: tensors and plain containers, each compared with its checksum.

    Raises:
        ValueError: if it is damaged, or not a checkpoint.
        OSError: if it cannot be read.
    """
    what = "checkpoint of this project"
    if (damage := verify_zip(path)) is not None:
        raise ValueError(f"{path} is not a readable {what}: {damage}")
    contents = load_torch(path, what)
    if not isinstance(contents, dict):
        raise ValueError(f"{path} is not a readable {what}: it holds a {type(contents).__name__}")
    return contents


def _load_folder(folder: Path, weights: str | None) -> tuple[Denoiser, dict[str, Any]]:
    try:
        stored = read_json(folder / "config.json")
        tensors = read_state(folder / "model.safetensors")
    except (OSError, ValueError) as error:
        raise ValueError(f"the model folder {folder} is damaged or not complete: {first_line(error)}") from error
    with _described(f"the model folder {folder}"):
        turned = stored.get("format") == 1 and stored["denoiser"]["network"].get("fourier_scale") is not None
        info = dict(stored.get("info", {}))
    if stored.get("format") not in (1, 2, FORMAT) or turned:
        raise ValueError(f"{folder / 'config.json'} has format {stored.get('format')!r}, this version reads {FORMAT}")
    if weights not in (None, info.get("weights")):
        raise ValueError(
            f"{folder} holds the weights {info.get('weights')}, not {weights}; load the run's .ckpt instead"
        )
    with _described(f"the model folder {folder}"):
        config = upgrade_config(stored["denoiser"], info.get("method"))
        check_depth(config["network"], tensors)
        denoiser = Denoiser.from_config(config)
        denoiser.network.load_state_dict(tensors)
    return denoiser.eval(), info


@contextmanager
def _described(source: str) -> Iterator[None]:
    """Settings or tensors that do not make a model end in one line."""
    try:
        yield
    except UnknownNameError as error:
        raise ValueError(f"{source} cannot be loaded: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, MemoryError) as error:
        what = " ".join(line.strip() for line in str(error).splitlines()[:2])  # torch's first line says nothing
        raise ValueError(
            f"{source} cannot be loaded: {what[:200]}; it was changed, or written by another version"
        ) from error


def _load_checkpoint(path: Path, weights: str | None) -> tuple[Denoiser, dict[str, Any]]:
    try:
        checkpoint = read_checkpoint(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    config = state.get("denoiser._extra_state") if isinstance(state, dict) else None
    if state is None or config is None:
        raise ValueError(f"{path} is a checkpoint, but not of a method of this project: it holds no denoiser")
    with _described(str(path)):
        averages = dict(checkpoint.get("callbacks", {}).get("WeightEMA", {}).get("averages", {}))
    weights = weights or next(iter(averages), "raw")
    if weights != "raw" and weights not in averages:
        raise ValueError(f"{path} holds the weights {['raw', *averages]}, not {weights}")
    prefix = "denoiser."
    with _described(str(path)):
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        config = upgrade_config(config, checkpoint.get("consistency", {}).get("method"))
        check_depth(config["network"], own)
        denoiser = Denoiser.from_config(config)
        denoiser.load_state_dict(own | averages.get(weights, {}))
        info = {**checkpoint.get("consistency", {}), "weights": weights, **state.get("progress._extra_state", {})}
    info.pop("config", None)
    return denoiser.eval(), info
