"""Refuse files that would fill the memory: what they ask for is compared with what they hold, before it is made."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency.models.register import find

_SLACK = 10_000_000  # numbers that a network may have beyond those of its file, so that the error can name what lacks
_MAX_SIDE = 8192  # pixels
_MAX_TAPS = 32


def check_network(description: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Refuse settings of a network of this package that is far larger than the tensors that should fill it.

    Args:
        description: Name and arguments of a registered network; wrong types fail with whatever error they cause.
        tensors: By name.

    Raises:
        ValueError: with both sizes.
    """
    cls, arguments = find("network", description["name"]), description["arguments"]
    if not cls.__module__.startswith("consistency."):
        return  # it may not bear to be built without memory
    sizes = [value.numel() for value in tensors.values() if isinstance(value, Tensor)]
    blocks = len(arguments.get("channel_mult", [1])) * max(arguments.get(name, 0) for name in ("num_blocks", "depth"))
    if not blocks <= len(sizes) + 1:  # each has several tensors
        raise ValueError(f"its settings ask for {blocks:,} blocks, it holds {len(sizes):,} tensors")
    if arguments["image_size"] > _MAX_SIDE or len(arguments.get("resample_filter", ())) > _MAX_TAPS:
        raise ValueError(f"image_size is at most {_MAX_SIDE} and resample_filter has at most {_MAX_TAPS} taps")
    with torch.device("meta"):  # shapes without memory
        needed = sum(value.numel() for value in cls(**arguments).state_dict().values())
    if needed > 2 * sum(sizes) + _SLACK:
        raise ValueError(f"its settings ask for a network of {needed:,} numbers, it holds {sum(sizes):,}")


def check_tensors(values: Iterable[Tensor], size: int) -> None:
    """Refuse tensors that are larger than their file: a stride of 0 makes a terabyte of four bytes.

    Args:
        values: Of the file.
        size: Bytes of the file.

    Raises:
        ValueError: if they are not ordinary, or together more than twice as large as the file.
    """
    total = 0
    for value in values:
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ValueError("it holds a tensor that is sparse, quantised or without numbers")
        total += value.numel() * value.element_size()
    if total > 2 * size + (1 << 20):
        raise ValueError(f"its tensors have {total:,} bytes, the file {size:,}")


def check_stored(path: Path) -> None:
    """Refuse a zip of `torch.save` whose entries are compressed, which torch never does: it would be a bomb.

    Raises:
        ValueError: if it is compressed, or no zip.
        OSError: if it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            packed = [info.filename for info in file.infolist() if info.file_size > info.compress_size]
            unpacked = sum(info.file_size for info in file.infolist())
    except (zipfile.BadZipFile, ValueError, RuntimeError) as error:
        raise ValueError("it is cut short or damaged") from error
    if packed:
        raise ValueError(f"{packed[0][:80]!r} in it is compressed, which torch.save never does")
    if unpacked > path.stat().st_size:
        raise ValueError("entries of it lie on top of each other, which torch.save never does")
