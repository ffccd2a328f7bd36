"""The files of a run directory as plain values; what is damaged is passed over and named."""

from __future__ import annotations

import csv
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from consistency.io import safe_load

# Whole numbers and texts of a row say how a score was measured; of the numbers with a point, these do not.
_NO_SCORES = ("images_seen", "step", "nfe", "seed")

_MAX_ROWS = 1 << 28  # bytes of a file of rows that are read

Curve = dict[int, float]  # images seen -> value


def number(value: Any) -> float | None:
    """A number of a file, `nan` and `inf` included; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def whole(value: Any) -> int | None:
    """A count of a file; None for anything else."""
    count = number(value)
    return int(count) if count is not None and abs(count) < float("inf") else None


def read_json(file: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        ValueError: for anything else, a file of no bytes included.
        OSError: if it cannot be read.
    """
    content = safe_load.read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not an object")
    return content


def read_yaml(file: Path) -> dict[str, Any]:
    """Settings as OmegaConf wrote them; references (`${...}`) stay as they are.

    Raises:
        ValueError: for a file that breaks off, or that holds no settings.
        OSError: if it cannot be read.
    """
    content = safe_load.read_yaml(file)
    if not content or not file.read_bytes().endswith(b"\n"):
        raise ValueError(f"{file.name} breaks off")
    return content


def read_overrides(file: Path) -> tuple[str, ...]:
    """`.hydra/overrides.yaml`: what was typed; empty where there is none or it is damaged."""
    try:
        content = safe_load.parse_yaml(file)
    except (OSError, ValueError):
        return ()
    return tuple(map(str, content)) if isinstance(content, list) else ()


def read_quality(file: Path, names: list[str]) -> tuple[dict[str, Curve], dict[str, Any], int]:
    """Scores of `quality.jsonl`.

    Args:
        file: Need not exist.
        names: Of the samplers, in the order in which they are measured.

    Returns:
        Score (`fd_classifier_onestep`) -> its curve, of rows of one place the last; the last row; damaged lines.
    """
    rows, damaged = _json_lines(file)
    samplers = dict.fromkeys(str(row["sampler"]) for row in rows if "sampler" in row)
    # The rows of a measurement are in the order of the samplers; `name` is in the rows of later versions.
    known = {sampler: name for sampler, name in zip_longest(samplers, names) if sampler is not None}
    curves: dict[str, Curve] = {}
    for row in rows:
        place = whole(row.get("images_seen"))
        if place is None:
            damaged += 1
            continue
        sampler = row.get("name") or known.get(str(row.get("sampler"))) or f"nfe{row.get('nfe')}"
        for score, value in row.items():
            if isinstance(value, float) and score not in _NO_SCORES:
                curves.setdefault(f"{score}_{sampler}", {})[place] = value
    return curves, rows[-1] if rows else {}, damaged


def _json_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    rows, damaged = [], 0
    for line in _text(file).splitlines():
        try:
            row = safe_load.parse_json(line, file)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            damaged += 1
    return rows, damaged


class Metrics(NamedTuple):
    """`metrics.csv`: the loss and N(k) against images seen, the last step, and the number of rows that are damaged."""

    loss: Curve
    levels: Curve
    step: int | None
    damaged: int


def read_metrics(file: Path) -> Metrics:
    """The curves of `metrics.csv`, which need not exist."""
    loss: Curve = {}
    levels: Curve = {}
    step = None
    text = _text(file)
    complete = text[: text.rfind("\n") + 1]
    damaged = int(len(complete) < len(text))
    try:
        for row in csv.DictReader(complete.replace("\0", "").splitlines()):
            if not row.get("images_seen") and not row.get("loss"):
                continue  # a row of scores alone
            place, value = whole(row.get("images_seen")), number(row.get("loss"))
            if place is None or value is None:
                damaged += 1
                continue
            loss[place], step = value, whole(row.get("step"))
            if (count := number(row.get("num_levels") or None)) is not None:
                levels[place] = count
    except csv.Error:
        damaged += 1
    return Metrics(loss, levels, step, damaged)


def _text(file: Path) -> str:
    """A file that need not exist; bytes that are no text become marks, which no parser takes, and so does an end."""
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        return stream.read(_MAX_ROWS).decode(errors="replace").replace("\r\n", "\n")
