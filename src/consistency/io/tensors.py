"""Files of tensors: read with nothing in them executed, written complete or not at all, with checksums where shared."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency.io.atomic import atomic_write, write_text
from consistency.io.safe_load import first_line, parse_json


def digest_of(*tensors: Tensor) -> str:
    """sha256 of dtypes, shapes and values, in hexadecimal: equal for equal tensors, wherever they lie."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def digest_of_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def load_torch(path: Path, what: str = "file of tensors") -> Any:
    """The contents of a file of `torch.save`: tensors and plain containers. Nothing in it is executed.

    Args:
        path: The file.
        what: It should be, for messages.

    Raises:
        ValueError: if it is damaged, another kind of file, or asks for anything to be run.
        OSError: if it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocols of other people's pickles
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # zip files and unpicklers fail in every way on damaged input
        raise ValueError(f"{path} is not a readable {what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What `torch.load` failed on, in one line; its own message advises to switch its protection off."""
    if asked := re.search(r"GLOBAL ([\w.]{1,80})", str(error)):
        return f"it asks for {asked[1]}, which no file of tensors needs; nothing of it was run"
    if isinstance(error, pickle.UnpicklingError | LookupError):  # LookupError: the unpickler on text
        return "it is another kind of file; nothing of it was run"
    return "it is cut short or damaged" if "PytorchStreamReader" in str(error) else first_line(error)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a `.safetensors` file, or from one of `torch.save`; nothing in it is executed.

    Raises:
        ValueError: if the file is missing or damaged, holds other things than tensors, or asks for anything to be run.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        contents = load_torch(path)
    except ValueError:
        raise
    except Exception as error:  # Safetensors has an error of its own, which is imported with it
        raise ValueError(f"{path} is not a readable file of tensors: {first_line(error)}") from error
    is_state = isinstance(contents, dict) and all(isinstance(key, str) for key in contents)
    if not is_state or not all(isinstance(value, Tensor) for value in contents.values()):
        raise ValueError(
            f"{path} is not a state dict: it holds a {type(contents).__name__} of other things than tensors"
        )
    return dict(contents)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write or replace a `.safetensors` file; see `atomic_write`."""
    from safetensors.torch import save_file

    with atomic_write(path) as partial:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial, metadata)


def write_tensors(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write a `.safetensors` file with `meta` and a checksum of each tensor; a `.json` beside it is for people."""
    sums = {name: digest_of(tensor) for name, tensor in tensors.items()}
    write_safetensors(path, tensors, {"meta": json.dumps(meta, sort_keys=True), "sha256": json.dumps(sums)})
    write_text(path.with_suffix(".json"), json.dumps(meta, indent=2, sort_keys=True) + "\n")


def read_meta(path: Path) -> dict[str, Any]:
    """What `write_tensors` was given as `meta`.

    Raises:
        ValueError: if the file is damaged or another program's.
    """
    meta = _read(path, "meta", ())[0]
    if not isinstance(meta, dict):
        raise ValueError(f"{path} is damaged (its meta is no table)")
    return meta


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors that `write_tensors` wrote; None for all of them.

    Raises:
        ValueError: if the file is damaged, or lacks one of them.
    """
    sums, tensors = _read(path, "sha256", names)
    for name, tensor in tensors.items():
        if not isinstance(sums, dict) or digest_of(tensor) != sums.get(name):
            raise ValueError(f"{path} is damaged ({name} does not have its checksum)")
    return tensors


def _read(path: Path, key: str, names: Iterable[str] | None) -> tuple[Any, dict[str, Tensor]]:
    """An entry of the header, which is JSON, and tensors; None for all that the file holds."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = parse_json(file.metadata()[key], path)
            return header, {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except (OSError, SafetensorError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)})") from error
