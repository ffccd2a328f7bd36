"""Read files that hold nothing but tensors: safetensors, and torch's own format with `weights_only`."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a `.safetensors` file, or from one of `torch.save`; nothing in it is executed.

    Raises:
        ValueError: if the file is missing or damaged, holds other things than tensors, or asks for anything to be run.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))
        raise ValueError(f"{path} was not read, it is more than tensors: {asked.strip()[:200]}") from error
    except Exception as error:  # safetensors, zip files and pickles fail in ways of their own
        raise ValueError(f"{path} is not a readable file of tensors: {str(error).splitlines()[0][:200]}") from error
    if not isinstance(contents, dict) or not all(isinstance(value, Tensor) for value in contents.values()):
        raise ValueError(
            f"{path} is not a state dict: it holds a {type(contents).__name__} of other things than tensors"
        )
    return dict(contents)


def is_zip(path: Path) -> bool:
    """Whether this is torch's newer format; the old one and NVlabs' snapshots are bare pickles."""
    return zipfile.is_zipfile(path)
