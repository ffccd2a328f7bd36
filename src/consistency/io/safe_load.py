"""Read files that anybody may have written: JSON, YAML and arrays, of bounded size, with nothing in them executed.

Every failure is a ValueError of one line that names the file.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MAX_TEXT, MAX_YAML = 1 << 26, 1 << 22  # bytes of a file; ours have kilobytes, and YAML takes a second a megabyte
MAX_DEPTH = 100  # of lists and tables in each other
MAX_EXPANSION, ALWAYS_ALLOWED = 100, 1 << 26  # times that a zip unpacks to, above so many bytes; images reach 10


def first_line(error: BaseException) -> str:
    """What an error says, on one short line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """A file of UTF-8 text.

    Raises:
        ValueError: if it is no text, or longer than `limit` bytes.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(limit + 1)  # not by its size: a pipe or a device has none
    if len(data) > limit:
        raise ValueError(f"{path} is larger than {limit:,} bytes, the limit for such a file")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text") from None


def read_json(path: Path, limit: int = MAX_TEXT) -> Any:
    """The contents of a JSON file.

    Raises:
        ValueError: if it is no JSON, too long or too deep.
        OSError: if it cannot be read.
    """
    return parse_json(read_text(path, limit), path)


def parse_json(text: str | bytes, path: object) -> Any:
    """The contents of JSON text; `path` names it in messages.

    Raises:
        ValueError: if it is no JSON, or too deep.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {first_line(error)}") from None
    _check_extent(content, path, len(text))
    return content


def _check_extent(content: Any, path: object, length: int) -> None:
    """Refuse depth, and what has grown: aliases of YAML can repeat a part a billion times, or put it into itself."""
    level, count = [content], 0
    for _ in range(MAX_DEPTH + 1):
        level = [part for part in level if isinstance(part, dict | list)]
        count += sum(map(len, level))
        if count > 10 * length:
            raise ValueError(f"{path} repeats itself by aliases: it has more than {count:,} parts")
        level = [value for part in level for value in (part.values() if isinstance(part, dict) else part)]
    if level:
        raise ValueError(f"{path} has more than {MAX_DEPTH} levels")


def read_yaml(path: Path) -> dict[str, Any]:
    """The table in a YAML file as plain values; `${...}` stays text, and no tag makes an object.

    Raises:
        ValueError: if it is no YAML or no table, is too long or too deep, or grows by its aliases.
        OSError: if it cannot be read.
    """
    return table_of(read_text(path, MAX_YAML), path)


def table_of(text: str, path: Path) -> dict[str, Any]:
    """As `read_yaml`, for text that lies in `path` or belongs to it."""
    content = _parse(text, path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a table of settings")
    return content


def parse_yaml(path: Path) -> Any:
    """As `read_yaml`, for any content."""
    return _parse(read_text(path, MAX_YAML), path)


def _parse(text: str, path: Path) -> Any:
    import yaml

    # The C parser takes 4 ms where OmegaConf.load takes 60; what OmegaConf wrote means the same to both.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(yaml.parse(text, loader), path)
        content = yaml.load(text, loader)
        _check_extent(content, path, len(text))
        return content
    except (yaml.YAMLError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} is not YAML: {first_line(error)}") from None
    except (ValueError, TypeError) as error:  # a date of month 13; a key that is a list
        said = first_line(error)
        raise ValueError(said if str(path) in said else f"{path} is not YAML: {said}") from None


def _check_events(events: Iterable[Any], path: Path) -> None:
    """Refuse depth before anything is built: the parser in C calls itself."""
    depth = 0
    for event in events:
        kind = type(event).__name__
        depth += kind.endswith("StartEvent") - kind.endswith("EndEvent")
        if depth > MAX_DEPTH:
            raise ValueError(f"{path} has more than {MAX_DEPTH} levels")
        if kind == "ScalarEvent" and len(event.value) > 1000 and event.value.lstrip("+-")[:1].isdigit():
            raise ValueError(f"{path} has a number of {len(event.value):,} digits")


def check_unpacked(packed: int, unpacked: int, what: object) -> None:
    """Refuse a decompression bomb by the sizes that it declares, before anything is unpacked.

    Raises:
        ValueError: with the limit.
    """
    limit = max(MAX_EXPANSION * packed, ALWAYS_ALLOWED)
    if unpacked > limit:
        raise ValueError(f"{what} would unpack {packed:,} to {unpacked:,} bytes; {limit:,} is the limit")


def read_npz(path: Path, names: Iterable[str], unless: tuple[str, str] | None = None) -> dict[str, np.ndarray]:
    """Those of the named arrays that an `.npz` holds; nothing is unpickled.

    Args:
        path: The file.
        names: Of the arrays.
        unless: (a, b): a is not read where there is b.

    Raises:
        ValueError: if it is damaged, or an array of it holds objects or is not of the size that it declares.
    """
    try:
        with zipfile.ZipFile(path) as file:
            infos = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            wanted = [name for name in names if name in infos]
            if unless is not None and unless[1] in infos:
                wanted = [name for name in wanted if name != unless[0]]
            check_unpacked(path.stat().st_size, sum(infos[name].file_size for name in wanted), path)
            return {name: _read_array(file, infos[name]) for name in wanted}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or first_line(error)}") from error
    except Exception as error:  # zip files, decompressors and headers fail in a dozen ways
        said = first_line(error)
        raise ValueError(said if str(path) in said else f"{path} is not an .npz of plain arrays: {said}") from error


def _read_array(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    from numpy.lib import format as npy

    with file.open(info) as member:
        shape, dtype = read_npy_header(member)
        declared, there = dtype.itemsize, info.file_size - member.tell()
        for length in shape:
            declared *= length
        if declared != there:
            raise ValueError(
                f"{info.filename} declares {list(shape)} of {dtype}, {declared:,} bytes, and has {there:,}"
            )
    with file.open(info) as member:
        return npy.read_array(member, allow_pickle=False)


def read_npy_header(stream: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type that an `.npy` declares; the stream then stands at the first number.

    Raises:
        ValueError: if it is no such header, or one of objects.
    """
    from numpy.lib import format as npy

    try:
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(npy.read_magic(stream))
        if read is None:
            raise ValueError("an .npy of a later version")
        shape, _, dtype = read(stream)
    except ValueError:
        raise
    except Exception as error:  # it is parsed as Python's text, in three ways
        raise ValueError(f"the header of an .npy cannot be read ({type(error).__name__})") from error
    if dtype.hasobject:
        raise ValueError("it holds objects, which would have to be unpickled")
    if any(length < 0 for length in shape):
        raise ValueError(f"it declares the shape {list(shape)}")
    return shape, dtype
