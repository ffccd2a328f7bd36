"""What W&B wrote to disk in the earlier sessions of a run: which points are there, and which are not.

A session writes one file, `wandb/offline-run-DATE-ID/run-ID.wandb` (`run-DATE-ID` where it was online). W&B's own
process writes it through a buffer that reaches the disk every 15 seconds or 32 KiB, and a SIGKILL takes what is in it.
So what was *sent* to W&B says nothing about what is *there*; only the file does. It is LevelDB's log format (records in
blocks of 32 KiB) of W&B's protocol buffers, as `wandb sync` reads it; W&B has no public function that does.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FILE_HEADER, _BLOCK, _RECORD_HEADER = 7, 32768, 7  # bytes
_FULL, _FIRST, _LAST = 1, 2, 4  # kinds of a record; 3 is a part from the middle
AXES = ("step", "images_seen")  # in every row; what says where a point is, and is none itself


@dataclass
class Row:
    """One row of the history: the optimizer step it belongs to, names of its points, files of its pictures."""

    step: int
    names: set[str] = field(default_factory=set)
    pictures: set[str] = field(default_factory=set)


@dataclass
class Segment:
    """The file of one session."""

    path: Path
    has_run: bool = False  # whether it says to which run it belongs
    readable: int = 0  # bytes up to the end of the last complete record
    rows: dict[int, Row] = field(default_factory=dict)  # by W&B's own step

    @property
    def is_online(self) -> bool:
        """Whether the session sent its points while it ran."""
        return not self.path.parent.name.startswith("offline-")

    @property
    def is_synced(self) -> bool:
        """Whether `wandb sync` has sent it."""
        return self.path.with_name(f"{self.path.name}.synced").exists()

    def lost_pictures(self, recorded: set[str]) -> Iterator[tuple[int, str, Path]]:
        """Step, name and file of pictures that no row names: W&B stores the file at once, its row later."""
        folder = self.path.parent / "files" / "media" / "images"
        for file in sorted(folder.rglob("*.png")):
            name, _, rest = file.relative_to(folder).as_posix().rpartition("_")[0].rpartition("_")
            if rest.isdigit() and file.name not in recorded:  # NAME_STEP_DIGEST.png
                yield int(rest), name, file

    def archive_run(self) -> None:
        """Keep the file, but out of the sight of `wandb sync`."""
        if self.path.exists():
            self.path.rename(self.path.with_name(f"{self.path.name}.aside"))

    def mend(self) -> None:
        """Make a file that ends in the middle acceptable to `wandb sync`.

        It refuses *all* files of a run that it is given when one of them does not say whose it is (nothing reached the
        disk but its header), and stops at one that ends with half a record. Nothing that could be read is removed.
        """
        if not self.has_run:
            self.archive_run()
        elif self.readable < self.path.stat().st_size:
            with self.path.open("r+b") as file:
                file.truncate(self.readable)


def read_segments(folder: Path, run_id: str) -> list[Segment]:
    """All sessions of a run, oldest first.

    Args:
        folder: W&B's folder in the run directory.
        run_id: W&B's name of the run.

    Raises:
        ValueError: if a file is of a kind that is not known.
    """
    name = glob.escape(run_id)
    found = sorted(folder.glob(f"*run-*/run-{name}.wandb"), key=lambda path: path.parent.name.split("run-")[1])
    return [_read(path) for path in found]


def _read(path: Path) -> Segment:
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2
    segment = Segment(path)
    data = path.read_bytes()
    if data[:4] != b":W&B"[: len(data)]:
        raise ValueError(f"{path} is not a file of W&B")
    for end, payload in _payloads(data):
        record = messages.Record()
        try:
            record.ParseFromString(payload)
        except DecodeError as error:
            raise ValueError(f"{path} is of a kind that is not known") from error
        segment.readable = end
        if record.HasField("run"):
            segment.has_run = True
        elif record.HasField("history"):
            _add_row(segment, record.history)
    return segment


def _payloads(data: bytes) -> Iterator[tuple[int, bytes]]:
    """End and content of each complete record."""
    position, parts = _FILE_HEADER, b""
    while position + _RECORD_HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if left < _RECORD_HEADER or (size, kind) == (0, 0):  # filled up with zeros
            position += left
            continue
        position += _RECORD_HEADER
        if position + size > len(data):
            return
        part = data[position : position + size]
        position += size
        parts = part if kind in (_FULL, _FIRST) else parts + part
        if kind in (_FULL, _LAST):
            yield position, parts


def _add_row(segment: Segment, history: Any) -> None:
    values = {}
    for item in history.item:
        path = tuple(item.nested_key) or (item.key,)
        values[path] = item.value_json
    number = int(values.get(("_step",), 0))
    row = Row(int(float(values.get(("step",), number))))
    row.names = {path[0] for path in values if not path[0].startswith("_") and path[0] not in AXES}
    for path, value in values.items():
        if path[1:] == ("filenames",):
            row.pictures |= {Path(file).name for file in json.loads(value)}
    segment.rows[number] = row
