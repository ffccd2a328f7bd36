"""Small files of tensors that processes share: written whole or not at all, checked when they are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from consistency.io.safe_load import parse_json


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


def write_tensors(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write a `.safetensors` file with `meta` and a checksum of each tensor; a `.json` beside it is for people."""
    from safetensors.torch import save_file

    sums = {name: digest_of(tensor) for name, tensor in tensors.items()}
    header = {"meta": json.dumps(meta, sort_keys=True), "sha256": json.dumps(sums)}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata=header)
        os.replace(partial, path)
        partial.write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n")
        os.replace(partial, path.with_suffix(".json"))
    finally:
        partial.unlink(missing_ok=True)


def read_meta(path: Path) -> dict[str, Any]:
    """What `write_tensors` was given as `meta`.

    Raises:
        ValueError: if the file is damaged or another program's.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = parse_json(file.metadata()["meta"], path)
            if not isinstance(meta, dict):
                raise ValueError("it says nothing of itself")
            return meta
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors that `write_tensors` wrote; None for all of them.

    Raises:
        ValueError: if the file is damaged, or lacks one of them.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            sums = dict(parse_json(file.metadata()["sha256"], path))
            tensors = {name: file.get_tensor(name) for name in (sums if names is None else names)}
    except (OSError, SafetensorError, LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    for name, tensor in tensors.items():
        if digest_of(tensor) != sums.get(name):
            raise ValueError(f"{path} is damaged ({name} does not have its checksum)")
    return tensors
