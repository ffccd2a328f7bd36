"""The folder of a multirun: `study.json` lists its runs, those that have not started too."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from consistency.files import locked

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
        listed = json.loads(file.read_text()) if file.exists() else {}
        command = shlex.join(["consistency-train", *sys.argv[1:]])
        earlier = {
            run: about for run, about in listed.get("runs", {}).items() if not _is_over(folder / run, about, runs)
        }
        known = {**earlier, **{run: {"overrides": list(given)} for run, given in runs.items()}}
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"study": name, "command": command, "runs": known}, indent=1) + "\n")
        os.replace(partial, file)


def _is_over(run_dir: Path, about: Mapping[str, Any], runs: Mapping[str, Sequence[str]]) -> bool:
    """Whether an entry is of a run that did not compose, and now does or was removed."""
    is_invalid = run_dir.name.startswith(INVALID)
    return is_invalid and (not run_dir.exists() or list(about["overrides"]) in [list(given) for given in runs.values()])


def shown(overrides: Sequence[str], all_overrides: Sequence[Sequence[str]]) -> str:
    """What tells these overrides from the others; what a variant sets comes after its name."""
    end = next((i + 1 for i, entry in enumerate(overrides) if entry.startswith("variant=")), len(overrides))
    different = [entry for entry in overrides[:end] if not all(entry in other for other in all_overrides)]
    return " ".join(different) or " ".join(overrides[:end])
