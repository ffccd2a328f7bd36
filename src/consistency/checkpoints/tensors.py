"""Read files that hold nothing but tensors: safetensors, and torch's own format with `weights_only`."""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from consistency.checkpoints.sizes import check_stored, check_tensors


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
        check_before_loading(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to switch its protection off.
        asked = re.search(r"GLOBAL ([\w.]{1,80})", str(error))
        what = f"it asks for {asked[1]}, which no file of tensors needs" if asked else "it is another kind of pickle"
        raise ValueError(f"{path} was not read: {what}; nothing of it was run") from error
    except Exception as error:  # safetensors, zip files and pickles fail in ways of their own
        raise ValueError(f"{path} is not a readable file of tensors: {what_torch_said(error)}") from error
    is_state = isinstance(contents, dict) and all(isinstance(key, str) for key in contents)
    if not is_state or not all(isinstance(value, Tensor) for value in contents.values()):
        raise ValueError(
            f"{path} is not a state dict: it holds a {type(contents).__name__} of other things than tensors"
        )
    try:
        check_tensors(contents.values(), path.stat().st_size)
    except ValueError as error:
        raise ValueError(f"{path} was not read: {error}") from None
    return dict(contents)


def check_before_loading(path: Path) -> None:
    """Refuse what `torch.load` would give memory to: packed entries, and `bytearray(n)`, which it lets a file call.

    Raises:
        ValueError: with what it is.
    """
    if not is_zip(path):
        return
    check_stored(path)
    with zipfile.ZipFile(path) as file:
        for name in file.namelist():
            if name.endswith("data.pkl"):
                called = {str(what) for op, what, _ in pickletools.genops(file.read(name)) if op.name == "GLOBAL"}
                if odd := sorted(called & {"builtins bytearray", "__builtin__ bytearray"}):
                    raise ValueError(f"it asks for {odd[0]}, which no file of tensors needs")


def is_zip(path: Path) -> bool:
    """Whether this is torch's newer format, whole or cut short; the old one and NVlabs' snapshots are bare pickles."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\3\4"


def what_torch_said(error: Exception) -> str:
    """One short line of an error of `torch.load`."""
    if isinstance(error, LookupError):  # of the unpickler, on text
        return "it is another kind of file"
    text = str(error) or type(error).__name__
    return "it is cut short or damaged" if "PytorchStreamReader" in text else text.splitlines()[0][:160]
