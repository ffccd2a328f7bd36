"""A study as it lies on disk: its runs, also those that failed, were stopped, are damaged or never started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consistency.report.logs import (
    Curve,
    number,
    read_json,
    read_metrics,
    read_overrides,
    read_quality,
    read_yaml,
    whole,
)

_MARKS = ("config.yaml", "status.json", "metrics.csv")  # one of them makes a folder a run
_STATES = ("finished", "failed", "interrupted", "pruned")


@dataclass
class Run:
    """One run directory. `state`: finished, failed, interrupted, pruned, unfinished, unreadable or not started."""

    folder: str
    path: Path
    overrides: tuple[str, ...] = ()
    state: str = "not started"
    step: int | None = None
    images_seen: int | None = None
    seconds: float | None = None
    error: str = ""  # its last line; the traceback is in the run's own log
    settings: dict[str, Any] | None = None  # config.yaml, "metric.c" -> value; None where there is none
    references: dict[str, str] = field(default_factory=dict)  # settings that follow others: `seed` -> `${seed}`
    curves: dict[str, Curve] = field(default_factory=dict)  # score -> its curve
    loss: Curve = field(default_factory=dict)
    levels: Curve = field(default_factory=dict)  # N(k)
    last: dict[str, float] = field(default_factory=dict)  # scores of status.json
    protocol: dict[str, Any] = field(default_factory=dict)  # what stands beside the last score
    damage: tuple[str, ...] = ()

    @property
    def is_finished(self) -> bool:
        """Whether the run enters means."""
        return self.state == "finished"

    @property
    def seed(self) -> Any:
        """Its seed; None where nothing says it."""
        typed = next((entry[5:] for entry in self.overrides if entry.startswith("seed=")), None)
        return (self.settings or {}).get("seed", typed)

    @property
    def variant(self) -> str | None:
        """Its name in an ablation."""
        typed = next((entry[8:] for entry in self.overrides if entry.startswith("variant=")), None)
        name = (self.settings or {}).get("variant", typed)
        return None if name is None else str(name)

    @property
    def told(self) -> str:
        """The state in words: `unfinished at step 300`."""
        where = f" at step {self.step:,}" if self.step is not None else ""
        if self.state in ("finished", "not started"):
            return self.state
        if self.state == "unreadable":
            return f"unreadable: {', '.join(self.damage)}"
        return f"{self.state}{where}"

    def curve(self, score: str) -> Curve:
        """A score, or `loss`, against images seen."""
        return self.loss if score == "loss" else self.curves.get(score, {})

    def final(self, score: str) -> float | None:
        """A score at the last place where it was measured, else what the status says; None where it never was."""
        curve = self.curve(score)
        return curve[max(curve)] if curve else self.last.get(score)


@dataclass
class Study:
    """A folder of runs, in the order in which the study lists them."""

    folder: Path
    name: str
    command: str
    runs: list[Run]
    damage: tuple[str, ...] = ()

    @property
    def scores(self) -> list[str]:
        """Names of all scores, in the order in which they appear; the loss where nothing else was measured."""
        names = dict.fromkeys(score for run in self.runs for score in run.curves)
        # A standard error of its own belongs beside its score, not in a plot.
        return [name for name in names if not _is_spread(name)] or ["loss"]


def _is_spread(score: str) -> bool:
    return "_std" in score


def read_study(folder: Path) -> Study:
    """Read a study folder, a plain folder of run directories, or one run directory.

    Raises:
        ValueError: one line, if there is no such folder or no run in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the folder of a study (outputs/STUDY) or of a run")
    content, damage = _study_file(folder / "study.json")
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
    runs = [read_run(name, path, listed.get(name)) for name, path in found.items()]
    name = content.get("study")
    return Study(
        folder=folder,
        name=name if isinstance(name, str) and name else folder.resolve().name,
        command=str(content.get("command") or ""),
        runs=runs,
        damage=damage,
    )


def _is_run(path: Path) -> bool:
    return any((path / mark).is_file() for mark in _MARKS)


def _study_file(file: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    if not file.exists():
        return {}, ()
    try:
        return read_json(file), ()
    except (OSError, ValueError):
        return {}, (file.name,)


def _listed(content: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Run folder -> overrides."""
    runs = content.get("runs")
    listed: dict[str, tuple[str, ...]] = {}
    for name, run in runs.items() if isinstance(runs, dict) else ():
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            continue  # of no folder in this one
        given = run.get("overrides") if isinstance(run, dict) else None
        listed[name] = tuple(map(str, given)) if isinstance(given, list) else ()
    return listed


def read_run(name: str, path: Path, overrides: tuple[str, ...] | None = None) -> Run:
    """Read one run directory, which need not exist.

    Args:
        name: Shown.
        path: Of the directory.
        overrides: Of `study.json`; None for what the run itself noted.
    """
    run = Run(name, path, overrides or read_overrides(path / ".hydra" / "overrides.yaml"))
    damage: list[str] = []
    tree = _read_settings(run, damage)
    _read_status(run, damage)
    run.curves, run.protocol, lines = read_quality(path / "quality.jsonl", _sampler_names(tree))
    metrics = read_metrics(path / "metrics.csv")
    run.loss, run.levels = metrics.loss, metrics.levels
    if damage:
        run.state = "unreadable"
    places = [place for curve in (run.loss, *run.curves.values()) for place in curve]
    # The status of a run that was killed is older than its last rows, and that of one that failed may not say.
    is_old = run.state in ("unfinished", "unreadable")
    if places and (is_old or run.images_seen is None):
        run.images_seen = max(places)
    if metrics.step is not None and (is_old or run.step is None):
        run.step = metrics.step
    rows = {"lines of quality.jsonl": lines, "lines of metrics.csv": metrics.damaged}
    run.damage = (*damage, *(f"{file} ({count} damaged)" for file, count in rows.items() if count))
    return run


def _read_settings(run: Run, damage: list[str]) -> dict[str, Any]:
    """The resolved settings, and which of them only repeat others."""
    tree: dict[str, Any] = {}
    file = run.path / "config.yaml"
    if file.exists():
        try:
            tree = read_yaml(file)
            run.settings = dict(_flat(tree))
        except (OSError, ValueError):
            damage.append(file.name)
    try:
        composed = read_yaml(run.path / ".hydra" / "config.yaml")
        run.references = {key: value for key, value in _flat(composed) if isinstance(value, str) and "${" in value}
    except (OSError, ValueError):
        pass  # not of a run's own files; only needed for a shorter list of differences
    return tree


def _read_status(run: Run, damage: list[str]) -> None:
    file = run.path / "status.json"
    if not file.exists():
        trained = (run.path / "metrics.csv").exists() or (run.path / "checkpoints").exists()
        run.state = "unfinished" if trained else "not started"
        return
    try:
        status = read_json(file)
    except (OSError, ValueError):
        damage.append(file.name)
        return
    state = status.get("state")
    run.state = state if state in _STATES else "unfinished"  # "running" may be of a process that was killed
    run.step, run.images_seen = whole(status.get("step")), whole(status.get("images_seen"))
    run.seconds = number(status.get("seconds"))
    scores = status.get("scores")
    scored = scores.items() if isinstance(scores, dict) else ()
    run.last = {str(name): value for name, given in scored if (value := number(given)) is not None}
    run.error = (str(status.get("error") or status.get("traceback") or "").strip().splitlines() or [""])[-1]
    if run.settings is None and not damage and run.state in ("finished", "interrupted", "pruned"):
        damage.append("config.yaml")  # those have had one; a run that failed early has not


def _sampler_names(tree: dict[str, Any]) -> list[str]:
    """As `callbacks.quality` measures them."""
    for path in (("callbacks", "quality", "samplers"), ("samplers",)):
        node: Any = tree
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict):
            return [str(name) for name in node]
    return []


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"metric": {"c": 1}}` -> ("metric.c", 1)."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
