"""Files that are whole: written beside, flushed, renamed; read with their checksums. Nothing heavy is imported."""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20


def atomic_replace(partial: Path, path: Path) -> None:
    """Make a file that is written the new `path`: after a crash there is the old one or the new one, whole."""
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
    """Replace the text of a file; see `atomic_replace`."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text)
        atomic_replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def verify_zip(path: Path) -> str | None:
    """What is wrong with a zip file of torch, or None: every member is read and compared with its checksum.

    torch itself does not look at them: a flipped bit would be a weight like any other.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:  # torch stores; a bomb does not
                    return f"its part {member.filename!r} is compressed"
                with archive.open(member) as file:  # at the end of a member its checksum is compared
                    while file.read(_CHUNK):
                        pass
    except OSError as error:
        if error.errno != errno.EINVAL:  # zipfile's own, on wrong offsets
            raise
        return "its parts are not where it says"
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as error:
        return str(error) or type(error).__name__
    return None


def checkpoint_manifest(checkpoint: Mapping[str, Any]) -> dict[str, int]:
    """The parts of a run's checkpoint, and the number of entries of each: `{"target": 68, "optimizer": 67, ...}`."""
    parts: dict[str, int] = {}
    for key in checkpoint.get("state_dict") or {}:
        name = key.partition(".")[0]
        parts[name] = parts.get(name, 0) + 1
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
        needed: What it must have beside what it says that it has.

    Raises:
        ValueError: with the name of the first part that is missing, or not all there.
    """
    there = checkpoint_manifest(checkpoint)
    said = (checkpoint.get("consistency") or {}).get("parts") or {}
    for name in {**said, **needed}:
        count = max(said.get(name, 0), needed.get(name, 0))
        if there.get(name, 0) < count:
            raise ValueError(
                f"{path} lacks the part {name!r} ({there.get(name, 0)} of {count} entries): it was changed, or written "
                "by another version. Bring the file back, or overwrite=true to set the run aside and start afresh"
            )
