"""The folder of a multirun: its runs, and `study.json`, which lists them, those that have not started too."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from consistency.io.atomic import write_text
from consistency.io.run_dir import locked
from consistency.io.safe_load import first_line, read_json

STUDY_FILE = "study.json"


@dataclass
class Run:
    """One run of a multirun; without a directory and a configuration, it does not compose."""

    overrides: list[str]
    run_dir: Path | None = None
    config: DictConfig | None = None
    error: str | None = None  # one line of why it failed; None: it has not


def plan_runs(context: HydraContext, config: DictConfig, jobs: Sequence[Sequence[str]], first: int = 0) -> list[Run]:
    """Compose the runs, which gives their directories, and list them in `study.json`.

    Args:
        context: Hydra's, with the loader of configurations.
        config: Of the multirun.
        jobs: Overrides of each run.
        first: Number of the first run, for `${hydra.job.num}`.

    Raises:
        ValueError: if two runs would share a directory.
    """
    folder = Path(str(config.hydra.sweep.dir))
    runs = []
    listed: dict[str, list[str]] = {}
    for number, job in enumerate(map(list, jobs), first):
        try:
            composed = context.config_loader.load_sweep_config(config, job)
            OmegaConf.update(composed, "hydra.job.num", number, force_add=True)
            name = str(composed.hydra.sweep.subdir)
        except Exception as error:  # Hydra, OmegaConf and resolvers raise of many kinds
            runs.append(Run(job, error=first_line(error)))
            continue
        if name in listed:
            raise ValueError(
                f"two runs would share {folder / name} ({' '.join(listed[name])}, {' '.join(job)}); leave run_name "
                "out, and values that are given twice"
            )
        listed[name] = job
        runs.append(Run(job, folder / name, composed))
    note_runs(folder, str(config.study_name), listed)
    return runs


def note_runs(folder: Path, name: str, runs: Mapping[str, Sequence[str]]) -> None:
    """Add runs (directory -> overrides) to `study.json`, which keeps what earlier commands put there."""
    with locked(folder / STUDY_FILE):
        known = listed_runs(folder)
        known.update({run: {"overrides": list(overrides)} for run, overrides in runs.items()})
        content = {"study": name, "command": shlex.join(["consistency-train", *sys.argv[1:]]), "runs": known}
        write_text(folder / STUDY_FILE, json.dumps(content, indent=1) + "\n")


def listed_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs in `study.json`: directory -> {"overrides": [...]}.

    Raises:
        ValueError: if it is damaged.
    """
    file = folder / STUDY_FILE
    try:
        runs = read_json(file)["runs"] if file.exists() else {}
        if all(isinstance(about["overrides"], list) for about in runs.values()):
            return dict(runs)
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise ValueError(f"{file} is damaged; move it away, it is made again (the runs are in their own folders)")


def labels(jobs: Sequence[Sequence[str]]) -> list[str]:
    """The overrides that tell each run from the others; what a variant sets comes after its name and is left out."""
    shared = set.intersection(*map(set, jobs)) if jobs else set()
    found = []
    for job in jobs:
        end = next((i + 1 for i, entry in enumerate(job) if entry.startswith("variant=")), None)
        found.append(" ".join(entry for entry in job[:end] if entry not in shared) or " ".join(job[:end]))
    return found
