"""The run directories of a study as data frames; what is damaged is passed over and named."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from consistency.io import safe_load
from consistency.io.nested import flatten

_MARKS = ("config.yaml", "status.json", "metrics.csv")  # one of them makes a folder a run
_STATES = ("finished", "failed", "interrupted", "pruned")
# Integers and texts of a row of quality.jsonl say how a score was measured; of the numbers with a point, these do not.
_NO_SCORES = ("images_seen", "step", "nfe", "seed")
_MAX_BYTES = 1 << 28  # of a file of rows


@dataclass
class Run:
    """One run directory; the fields are the columns of `Study.runs`.

    `state` is finished, failed, interrupted, pruned, unfinished, unreadable or not started.
    """

    run: str  # name of the folder
    path: Path
    overrides: tuple[str, ...] = ()
    state: str = "not started"
    step: float = math.nan
    images_seen: float = math.nan
    seconds: float = math.nan
    error: str = ""  # its last line; the traceback is in the run's own log
    config: dict[str, Any] | None = None  # config.yaml, "metric.c" -> value
    references: dict[str, str] = field(default_factory=dict)  # settings that repeat others: `data.seed` -> `${seed}`
    protocol: dict[str, Any] = field(default_factory=dict)  # what stands beside the last score
    damage: tuple[str, ...] = ()
    seed: str | None = None
    variant: str | None = None  # its name in an ablation


@dataclass(frozen=True)
class Study:
    """A folder of runs.

    Attributes:
        name: Of the study.
        command: That began it; empty if nothing says it.
        damage: Files of the study itself that cannot be read.
        runs: One row a run, in the order of the study, by the name of its folder; the columns are the fields of `Run`.
        curves: One row a measurement: run, score, images_seen, value; the loss and N(k) are scores of their own.
        finals: The last value of each score of each run: run, score, value.
    """

    name: str
    command: str
    damage: tuple[str, ...]
    runs: pd.DataFrame
    curves: pd.DataFrame
    finals: pd.DataFrame

    @property
    def scores(self) -> list[str]:
        """Names of all scores in the order in which they appear; the loss where nothing else was measured."""
        names = [name for name in self.curves["score"].unique() if name not in ("loss", "num_levels")]
        # A standard error (`is_std`) belongs beside its score and has no row of its own.
        return [name for name in names if "_std" not in name] or ["loss"]


def read_study(folder: Path) -> Study:
    """Read a study folder, a plain folder of run directories, or one run directory.

    Raises:
        ValueError: one line, if there is no such folder or no run in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the folder of a study (outputs/STUDY) or of a run")
    damage: list[str] = []
    content = _read(_read_object, folder / "study.json", damage) or {}
    listed = _listed(content)
    if not listed and _is_run(folder):
        found = {folder.resolve().name: folder}
    else:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and _is_run(path))
        found = {name: folder / name for name in listed} | {path.name: path for path in inside}
    if not found:
        studies = sorted(path.parent.name for path in folder.glob("*/study.json"))
        there = f"; studies there: {', '.join(studies)}" if studies else ""
        raise ValueError(f"no runs in {folder}: no folder in it has a config.yaml, status.json or metrics.csv{there}")
    runs, curves, reported = [], [], []
    for name, path in found.items():
        run, curve, scores = read_run(name, path, listed.get(name, ()))
        runs.append(run)
        curves.append(curve)
        reported += [{"run": name, "score": score, "value": value} for score, value in scores.items()]
    title, points = content.get("study"), pd.concat(curves, ignore_index=True)
    # What the status says stands in where a score has no row of its own.
    points = points.astype({"images_seen": float, "value": float})
    finals = pd.DataFrame([*reported, *points.sort_values("images_seen", kind="stable").to_dict("records")])
    # As objects: a variant that is None stays so.
    table = pd.DataFrame([vars(run) for run in runs], index=list(found), dtype=object)
    return Study(
        name=title if isinstance(title, str) and title else folder.resolve().name,
        command=str(content.get("command") or ""),
        damage=tuple(damage),
        runs=table.astype(dict.fromkeys(("step", "images_seen", "seconds"), float)),
        curves=points,
        finals=finals.reindex(columns=["run", "score", "value"]).drop_duplicates(["run", "score"], keep="last"),
    )


def _is_run(path: Path) -> bool:
    return any((path / mark).is_file() for mark in _MARKS)


def _listed(content: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Run folder -> overrides, as study.json lists them."""
    runs = content.get("runs")
    listed: dict[str, tuple[str, ...]] = {}
    for name, run in runs.items() if isinstance(runs, dict) else ():
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            continue  # not a folder in this one
        overrides = run.get("overrides") if isinstance(run, dict) else None
        listed[name] = tuple(map(str, overrides)) if isinstance(overrides, list) else ()
    return listed


def read_run(name: str, path: Path, overrides: tuple[str, ...] = ()) -> tuple[Run, pd.DataFrame, dict[str, float]]:
    """Read one run directory, which need not exist.

    Args:
        name: Of the folder.
        path: Of the directory.
        overrides: Of study.json; empty for what the run itself noted.

    Returns:
        The run; its curves (run, score, images_seen, value); the scores of its status.
    """
    run, damage, ignored = Run(name, path, overrides), list[str](), list[str]()
    if not overrides:
        typed = _read(safe_load.parse_yaml, path / ".hydra" / "overrides.yaml", ignored)
        run.overrides = tuple(map(str, typed)) if isinstance(typed, list) else ()
    config = _read(_read_settings, path / "config.yaml", damage)
    run.config = None if config is None else flatten(config)
    composed = flatten(_read(_read_settings, path / ".hydra" / "config.yaml", ignored) or {})
    run.references = {key: value for key, value in composed.items() if isinstance(value, str) and "${" in value}
    reported = _read_status(run, damage)
    scores, run.protocol, bad_lines = _read_quality(path / "quality.jsonl")
    losses, last_step, bad_rows = _read_metrics(path / "metrics.csv")
    run.state = "unreadable" if damage else run.state
    for file, count in (("quality.jsonl", bad_lines), ("metrics.csv", bad_rows)):
        damage += [f"lines of {file} ({count} damaged)"] if count else []
    run.damage = tuple(damage)
    curves = pd.concat([pd.DataFrame(scores, columns=["score", "images_seen", "value"]), losses], ignore_index=True)
    # The status of a run that was killed is older than its last rows, and that of one that failed may not say.
    is_old = run.state in ("unfinished", "unreadable")
    if len(curves) and (is_old or math.isnan(run.images_seen)):
        run.images_seen = curves["images_seen"].max()
    if is_old or math.isnan(run.step):
        run.step = run.step if math.isnan(last_step) else last_step
    run.seed, run.variant = (_setting_of(run, key) for key in ("seed", "variant"))
    # A run that went on after a kill may have measured a place twice.
    curves = curves.drop_duplicates(["score", "images_seen"], keep="last")
    return run, curves.assign(run=name), reported


def _setting_of(run: Run, key: str) -> str | None:
    """A setting of config.yaml, else as it was typed."""
    typed = next((entry.partition("=")[2] for entry in run.overrides if entry.startswith(f"{key}=")), None)
    value = (run.config or {}).get(key, typed)
    return None if value is None else str(value)


def _read(reader: Callable[[Path], Any], file: Path, damage: list[str]) -> Any:
    """The contents of a file; None if there is none, or if it cannot be read, which is then noted."""
    if not file.exists():
        return None
    try:
        return reader(file)
    except (OSError, ValueError):
        damage.append(file.name)
        return None


def _read_object(file: Path) -> dict[str, Any]:
    content = safe_load.read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not an object")
    return content


def _read_settings(file: Path) -> dict[str, Any]:
    """Settings as OmegaConf wrote them; references (`${...}`) stay as they are."""
    content = safe_load.read_yaml(file)
    if not content or not file.read_bytes().endswith(b"\n"):
        raise ValueError(f"{file.name} breaks off")
    return content


def _read_status(run: Run, damage: list[str]) -> dict[str, float]:
    """Fill in what status.json says; its scores."""
    status = _read(_read_object, run.path / "status.json", damage)
    if status is None:
        has_trained = (run.path / "metrics.csv").exists() or (run.path / "checkpoints").exists()
        run.state = "unfinished" if has_trained else "not started"
        return {}
    # "running" may be of a process that was killed.
    run.state = status["state"] if status.get("state") in _STATES else "unfinished"
    run.step, run.images_seen, run.seconds = (_number(status.get(key)) for key in ("step", "images_seen", "seconds"))
    run.error = (str(status.get("error") or status.get("traceback") or "").strip().splitlines() or [""])[-1]
    if run.config is None and not damage and run.state in ("finished", "interrupted", "pruned"):
        damage.append("config.yaml")  # those have had one; a run that failed early has not
    scores = status.get("scores")
    return {name: _number(value) for name, value in scores.items()} if isinstance(scores, dict) else {}


def _read_quality(file: Path) -> tuple[list[tuple[str, float, float]], dict[str, Any], int]:
    """The rows of quality.jsonl: (`fd_classifier_onestep`, images seen, value); the last row; damaged lines."""
    points, last, damaged = [], dict[str, Any](), 0
    for line in _lines(file):
        try:
            row = safe_load.parse_json(line, file)
            images_seen = _number(row["images_seen"])
        except (ValueError, TypeError, LookupError):
            images_seen = math.nan
        if not math.isfinite(images_seen):
            damaged += bool(line.strip())
            continue
        last, sampler = row, row.get("name") or f"nfe{row.get('nfe')}"
        measured = [(score, value) for score, value in row.items() if isinstance(value, float)]
        points += [(f"{score}_{sampler}", images_seen, value) for score, value in measured if score not in _NO_SCORES]
    return points, last, damaged


def _read_metrics(file: Path) -> tuple[pd.DataFrame, float, int]:
    """The rows of metrics.csv (score: `loss` or `num_levels`, images_seen, value); the last step; damaged lines.

    A row of other scores alone has no loss and is no damage; a last line without an end is that of a killed process.
    """
    lines, damaged = _lines(file), list[Any]()
    damaged += [line for line in lines[-1:] if not line.endswith("\n")]
    text = io.StringIO("".join(lines[: len(lines) - len(damaged)]))
    columns = ["step", "images_seen", "loss", "num_levels"]
    try:
        table = pd.read_csv(
            text, dtype=str, keep_default_na=False, engine="python", index_col=False, on_bad_lines=damaged.append
        )
    except ValueError:  # of pandas: there is no line, or one that is no CSV
        table = pd.DataFrame()
    rows = table.reindex(columns=columns, fill_value="").fillna("")
    rows = rows[rows["loss"] != ""]
    numbers = rows.apply(pd.to_numeric, errors="coerce").astype(float)
    is_bad = ~np.isfinite(numbers["images_seen"]) | (numbers["loss"].isna() & (rows["loss"].str.lower() != "nan"))
    numbers = numbers[~is_bad]
    points = numbers.melt("images_seen", ["loss", "num_levels"], var_name="score")
    points = points[(points["score"] == "loss") | points["value"].notna()]
    return points, numbers["step"].iloc[-1] if len(numbers) else math.nan, len(damaged) + int(is_bad.sum())


def _lines(file: Path) -> list[str]:
    """The lines of a file that need not exist; bytes that are no text become marks, which no parser takes."""
    if not file.is_file():
        return []
    with file.open("rb") as stream:
        text = stream.read(_MAX_BYTES).decode(errors="replace")
    return text.replace("\r\n", "\n").replace("\0", "\ufffd").splitlines(keepends=True)


def _number(value: Any) -> float:
    """A number of a file, `inf` included; nan for anything else."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
