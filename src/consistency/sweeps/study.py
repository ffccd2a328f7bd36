"""The folder of a multirun: `study.json` lists its runs, those that have not started too."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from consistency.io.run_dir import is_name, locked
from consistency.io.safe_load import read_json

log = logging.getLogger(__name__)

STUDY_FILE = "study.json"
INVALID = "invalid-"  # begins the name of a run that does not compose


@contextmanager
def in_one_line() -> Iterator[None]:
    """End with one line where the user's command is wrong; HYDRA_FULL_ERROR=1 shows the traceback."""
    try:
        yield
    except ValueError as error:
        if os.environ.get("HYDRA_FULL_ERROR", "0") != "0":
            raise
        sys.exit(f"consistency: {error}".splitlines()[0])


def note_runs(folder: Path, name: str, runs: Mapping[str, Sequence[str]]) -> None:
    """Add runs (directory -> overrides) to the list, which keeps what earlier commands put there."""
    file = folder / STUDY_FILE
    with locked(file):
        listed = _read(file)
        command = shlex.join(["consistency-train", *sys.argv[1:]])
        earlier = {
            run: about for run, about in listed.get("runs", {}).items() if not _is_over(folder / run, about, runs)
        }
        known = {**earlier, **{run: {"overrides": list(given)} for run, given in runs.items()}}
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"study": name, "command": command, "runs": known}, indent=1) + "\n")
        os.replace(partial, file)


def _read(file: Path) -> dict[str, Any]:
    """The list; a damaged one is set aside, the runs are in their folders all the same."""
    if not file.exists():
        return {}
    try:
        listed = read_json(file)
        runs = listed.get("runs", {}).values()
        if all(isinstance(about["overrides"], list) for about in runs):
            return listed
    except (ValueError, AttributeError, LookupError, TypeError):
        pass
    aside = file.with_suffix(f".damaged-{time.time_ns()}")
    file.rename(aside)
    log.warning("%s is damaged; set aside as %s and begun anew", file, aside.name)
    return {}


def check_folder(name: object) -> None:
    """Refuse a study outside of outputs/, before anything is written there.

    Raises:
        ValueError: if the name is not that of a folder.
    """
    if not is_name(name):
        raise ValueError(f"study_name must be of letters, digits and . , = + - _ (a folder in outputs/), got {name!r}")


def check_no_estimate(arguments: Sequence[str]) -> None:
    """Refuse to estimate many runs at once: side by side they would slow each other down.

    Raises:
        ValueError: if an argument sets `estimate`.
    """
    if any(argument.lstrip("+").startswith("estimate=") for argument in arguments):
        raise ValueError("estimate=true is for one run; leave out -m, ablation= and sweep=")


def _is_over(run_dir: Path, about: Mapping[str, Any], runs: Mapping[str, Sequence[str]]) -> bool:
    """Whether an entry is of a run that did not compose, and now does or was removed."""
    is_invalid = run_dir.name.startswith(INVALID)
    return is_invalid and (not run_dir.exists() or list(about["overrides"]) in [list(given) for given in runs.values()])


def shown(overrides: Sequence[str], all_overrides: Sequence[Sequence[str]]) -> str:
    """What tells these overrides from the others; what a variant sets comes after its name."""
    end = next((i + 1 for i, entry in enumerate(overrides) if entry.startswith("variant=")), len(overrides))
    different = [entry for entry in overrides[:end] if not all(entry in other for other in all_overrides)]
    return " ".join(different) or " ".join(overrides[:end])
