"""Read files that anybody may have written: text, JSON, YAML and arrays. Nothing in them is executed.

Every failure is a ValueError of one line that names the file. `io.tensors` reads files of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MAX_BYTES = 1 << 26  # of a text file; ours have kilobytes
MAX_DEPTH = 100  # of lists and tables in each other: what reads them may call itself


def first_line(error: BaseException) -> str:
    """The message of an error on one short line; its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def read_text(path: Path) -> str:
    """A file of UTF-8 text.

    Raises:
        ValueError: if it is no text, or longer than `MAX_BYTES`.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)  # not by its size: a pipe or a device has none
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES:,} bytes, the limit for such a file")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text") from None


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        ValueError: if it is no JSON, too long or too deep.
        OSError: if it cannot be read.
    """
    return parse_json(read_text(path), path)


def parse_json(text: str | bytes, path: object) -> Any:
    """The contents of JSON text; `path` names it in messages.

    Raises:
        ValueError: if it is no JSON, or too deep.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {first_line(error)}") from None
    _check_depth(content, path)
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """The table in a YAML file as plain values; `${...}` stays text, and no tag makes an object.

    Raises:
        ValueError: if it is no YAML or no table, too long or too deep.
        OSError: if it cannot be read.
    """
    return table_of(read_text(path), path)


def table_of(text: str, path: Path) -> dict[str, Any]:
    """As `read_yaml`, for text that lies in `path` or belongs to it."""
    content = _parse_yaml(text, path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a table of settings")
    return content


def parse_yaml(path: Path) -> Any:
    """As `read_yaml`, for any content."""
    return _parse_yaml(read_text(path), path)


def _parse_yaml(text: str, path: Path) -> Any:
    import yaml

    # The C parser takes 4 ms where OmegaConf.load takes 60; what OmegaConf wrote means the same to both.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        content = yaml.load(text, loader)
    # A date of month 13 is a ValueError, a key that is a list a TypeError.
    except (yaml.YAMLError, RecursionError, OverflowError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not YAML: {first_line(error)}") from None
    _check_depth(content, path)
    return content


def _check_depth(content: Any, path: object) -> None:
    """Refuse what is nested too deep, or, by an alias of YAML, in itself."""
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        parts = {id(part): part for part in level if isinstance(part, dict | list)}  # each once: aliases repeat
        level = [value for part in parts.values() for value in (part.values() if isinstance(part, dict) else part)]
    if level:
        raise ValueError(f"{path} has more than {MAX_DEPTH} levels")


def read_npz(path: Path, names: Iterable[str], unless: tuple[str, str] | None = None) -> dict[str, np.ndarray]:
    """Those of the named arrays that an `.npz` holds; nothing is unpickled.

    Args:
        path: The file.
        names: Of the arrays.
        unless: (a, b): a is not read where there is b.

    Raises:
        ValueError: if it cannot be read, is damaged, or an array of it holds objects.
    """
    from numpy.lib.npyio import NpzFile

    try:
        with path.open("rb") as stream, NpzFile(stream, allow_pickle=False) as file:
            wanted = [name for name in names if name in file.files]
            if unless is not None and unless[1] in file.files:
                wanted = [name for name in wanted if name != unless[0]]
            arrays = {name: file[name] for name in wanted}
        if other := [name for name, array in arrays.items() if isinstance(array, bytes)]:
            raise ValueError(f"{other[0]} is no array")
        return arrays
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or first_line(error)}") from error
    except Exception as error:  # zip files, decompressors and headers fail in a dozen ways
        raise ValueError(f"{path} is not an .npz of plain arrays: {first_line(error)}") from error
