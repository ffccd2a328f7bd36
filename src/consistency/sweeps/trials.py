"""The trials of a search: kept in one file, told how they ended, taken up again, summed up."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from consistency.commands.folder import status_of
from consistency.io.safe_load import first_line, read_json
from consistency.sweeps.space import as_override
from consistency.sweeps.study import STUDY_FILE

log = logging.getLogger(__name__)

JOURNAL = "search.journal"
SUMMARY_FILE = "search.json"


def open_study(folder: Path, name: str, direction: str, pruner: Any) -> Any:
    """Open the search of a folder, or begin it; a folder that was renamed keeps its search.

    Raises:
        ValueError: if it was begun with the other direction, or its file is damaged.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = (folder / JOURNAL).absolute()  # Optuna's lock is a link to it
    lock = JournalFileSymlinkLock(str(file))
    _mend(file, lock)
    wanted = optuna.study.StudyDirection[direction.upper()]
    try:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(file), lock))
        name = next(iter(optuna.get_all_study_names(storage)), name)
        study = optuna.create_study(
            study_name=name, storage=storage, direction=wanted, pruner=pruner, load_if_exists=True
        )
    except OSError:
        raise
    except Exception as error:  # Optuna replays the file, and stumbles over whatever is wrong in it
        what = f"{file} is damaged ({type(error).__name__}: {first_line(error)})"
        raise ValueError(f"{what}; move it away, or study_name=NAME for another search") from error
    if (old := study.direction.name.lower()) != direction:
        raise ValueError(
            f"the search in {folder} is with hydra.sweeper.direction={old}, not {direction}; use that, or "
            "study_name=NAME for another"
        )
    return study


def _mend(file: Path, lock: Any) -> None:
    """Cut off a last line that was not written to its end: with it, Optuna could read nothing written after it."""
    if not file.exists() or (written := file.read_bytes()).endswith(b"\n") or not written:
        return
    lock.acquire()
    try:
        with file.open("rb+") as journal:
            written = journal.read()
            journal.truncate(written.rfind(b"\n") + 1)
    finally:
        lock.release()


def name_of(trial: Any) -> str:
    """`trial007`: its runs keep the name when it is tried again under another of Optuna's numbers."""
    return trial.user_attrs.get("name", f"trial{trial.number:03d}")


def latest_attempts(study: Any) -> dict[str, Any]:
    """Name -> trial, the last try of each; those that were never launched are left out."""
    return {name_of(trial): trial for trial in study.get_trials(deepcopy=False) if "overrides" in trial.user_attrs}


def requeue_unfinished(study: Any) -> list[Any]:
    """Trials of an earlier command to launch again: those that it left, and those that failed, as new tries.

    A try that was killed before it had all its parameters is given up.
    """
    from optuna.trial import TrialState, create_trial

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if "overrides" not in trial.user_attrs:
            study.tell(trial.number, state=TrialState.FAIL)
    for name, trial in latest_attempts(study).items():
        if trial.state == TrialState.FAIL:
            again = create_trial(
                state=TrialState.RUNNING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={"overrides": trial.user_attrs["overrides"], "name": name},
            )
            study.add_trial(again)
    return [trial for trial in latest_attempts(study).values() if trial.state == TrialState.RUNNING]


def tell(study: Any, trial: Any, result: JobReturn) -> str | None:
    """Tell the study how a run ended, unless the run has done so itself; returns the error of one that failed.

    A run that diverged is worse than any other: its objective is infinite (Optuna takes no NaN).
    """
    from optuna.trial import TrialState

    status = status_of(run_dir_of(result))
    value: Any = result.return_value if result.status == JobStatus.COMPLETED else None
    if result.status != JobStatus.COMPLETED and not status.get("diverged"):
        error = str(result._return_value)
    elif value is None and not status.get("diverged"):
        error = "it returned no objective; give it callbacks=quality or callbacks.log"
    else:
        error = ""
    if study.get_trials(deepcopy=False)[trial.number].state.is_finished():
        return error or None
    if error:
        study.tell(trial.number, state=TrialState.FAIL)
        return error
    if status.get("state") == "pruned":
        study.tell(trial.number, state=TrialState.PRUNED)
    else:
        worst = math.inf if study.direction.name == "MINIMIZE" else -math.inf
        is_number = isinstance(value, int | float) and not math.isnan(value)
        study.tell(trial.number, float(value) if is_number else worst)
    return None


def run_dir_of(result: JobReturn) -> Path:
    """Where a run lies: the launcher of this package says it itself, the others in Hydra's configuration of the job."""
    hydra_cfg = result.hydra_cfg
    return Path(str(result.working_dir if hydra_cfg is None else hydra_cfg.hydra.runtime.output_dir))


def write_summary(study: Any, folder: Path, objective: str | None) -> dict[str, Any]:
    """Write `search.json`: all trials, the best first, and their parameters as overrides.

    Args:
        study: The search.
        folder: Of the search.
        objective: Name of the score; None: as the runs call it.
    """
    runs = _runs_of(folder)
    said = {name: status_of(folder / run) for name, run in runs.items()}
    rows = []
    for name, trial in latest_attempts(study).items():
        row = _row(name, trial)
        error = said.get(name, {}).get("error") if row["state"] in ("failed", "diverged") else None
        rows.append({**row, "run": runs.get(name), "error": error})
    sign = 1 if study.direction.name == "MINIMIZE" else -1
    rows.sort(key=lambda row: (row["state"] != "finished", sign * (row["objective"] or 0)))
    names = (status.get("objective_name") for status in said.values())
    summary = {
        "study": study.study_name,
        "direction": study.direction.name.lower(),
        "objective": objective or next((name for name in names if name), None),
        "best": rows[0] if rows and rows[0]["state"] == "finished" else None,
        "trials": rows,
    }
    partial = folder / f"{SUMMARY_FILE}.partial"
    partial.write_text(json.dumps(summary, indent=1) + "\n")
    os.replace(partial, folder / SUMMARY_FILE)
    return summary


def _runs_of(folder: Path) -> dict[str, str]:
    """Name of a trial -> its run directory."""
    file = folder / STUDY_FILE
    runs = read_json(file)["runs"] if file.exists() else {}
    return {
        entry.removeprefix("variant="): run
        for run, known in runs.items()
        for entry in known["overrides"]
        if entry.startswith("variant=")
    }


def _row(name: str, trial: Any) -> dict[str, Any]:
    state = {"COMPLETE": "finished", "FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())
    value = trial.value if state in ("finished", "pruned") else None
    if value is not None and math.isinf(value):
        state, value = "diverged", None
    return {
        "trial": name,
        "state": state,
        "objective": value,
        "overrides": [as_override(key, value) for key, value in trial.params.items()],
        "scores": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
    }


def log_summary(summary: dict[str, Any], folder: Path, *, shown: int = 5) -> None:
    """Say how many trials ended how, the first few, and the best as something to paste."""
    rows: Sequence[dict[str, Any]] = summary["trials"]
    states = [row["state"] for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    log.info("%s: %d trials (%s)", folder, len(rows), counts or "none")
    for row in rows[:shown]:
        if row["state"] == "finished":
            log.info("%-9s %-10.5g %s", row["trial"], row["objective"], " ".join(map(_short, row["overrides"])))
    if (best := summary["best"]) is None:
        log.info("no trial has finished with a finite objective")
        return
    log.info("best: %s, %s %.5g; with", best["trial"], summary["objective"] or "objective", best["objective"])
    log.info("    %s", shlex.join(best["overrides"]))
    log.info("all of them: %s; compare them: consistency-report %s", folder / SUMMARY_FILE, folder)


def _short(override: str) -> str:
    """`optimizer.lr=0.00123456789` -> `lr=0.001235`."""
    name, _, text = override.partition("=")
    with suppress(ValueError):
        text = text if text.isdigit() else f"{float(text):.4g}"
    return f"{'.'.join(name.split('.')[-2:])}={text}"
