"""Files that are complete or absent: written beside, flushed, renamed; checked by their checksums and parts."""

from __future__ import annotations

import errno
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield the name of a file to write; it becomes `path` when the block ends, and is deleted if the block fails.

    Args:
        path: The file; its folder is made, and an earlier file of the name is replaced.
        flush: Wait for the disk, so that a crash of the machine leaves the old file or the new one. False for images
            written by the thousand.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes files that only their owner can read
        if flush:
            atomic_replace(partial, path)
        else:
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def atomic_replace(partial: Path, path: Path) -> None:
    """Make a file that is written the new `path`: after a crash there is the old one or the new one, complete."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    with suppress(OSError):  # some file systems cannot flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Replace the text of a file; see `atomic_write`."""
    with atomic_write(path) as partial:
        partial.write_text(text)


def verify_zip(path: Path) -> str | None:
    """What is wrong with a zip file, or None: every member is read and compared with its checksum.

    torch itself does not look at them: a flipped bit would be a weight like any other.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError as error:
        if error.errno != errno.EINVAL:  # that one is zipfile's own, on wrong offsets
            raise
        return "it is cut short or damaged"
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, zlib.error) as error:
        return f"it is cut short or damaged ({error or type(error).__name__})"
    return None if damaged is None else f"its part {damaged!r} does not have its checksum"


def checkpoint_manifest(checkpoint: Mapping[str, Any]) -> dict[str, int]:
    """The parts of a run's checkpoint, and the number of entries of each: `{"target": 68, "optimizer": 67, ...}`."""
    parts = dict(Counter(key.partition(".")[0] for key in checkpoint.get("state_dict") or ()))
    for number, state in enumerate(checkpoint.get("optimizer_states") or ()):
        parts[f"optimizer_states[{number}]"] = len(state["state"])
    for number, _ in enumerate(checkpoint.get("lr_schedulers") or ()):
        parts[f"lr_schedulers[{number}]"] = 1
    for name in checkpoint.get("callbacks") or {}:
        parts[f"callbacks.{name}"] = 1
    for name in ("loops", "MixedPrecision"):  # the loops' counters; the scaler of fp16
        if name in checkpoint:
            parts[name] = 1
    return parts


def verify_manifest(checkpoint: Mapping[str, Any], path: Path, needed: Mapping[str, int]) -> None:
    """Refuse a checkpoint that lacks a part.

    Args:
        checkpoint: Of a run.
        path: For the message.
        needed: Parts that it must have beside those of its own manifest, and their numbers of entries.

    Raises:
        ValueError: with the name of the first part that is missing, or not all there.
    """
    found = checkpoint_manifest(checkpoint)
    written = (checkpoint.get("consistency") or {}).get("parts") or {}
    for name in {**written, **needed}:
        count = max(written.get(name, 0), needed.get(name, 0))
        if found.get(name, 0) < count:
            raise ValueError(
                f"{path} lacks the part {name!r} ({found.get(name, 0)} of {count} entries): it was changed, or written "
                "by another version. Bring the file back, or overwrite=true to set the run aside and start afresh"
            )
