"""Tables and remarks: numbers with the number of runs behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from consistency.report.groups import Group, changes, differences, is_ablation, is_search
from consistency.report.study import Run, Study

# What must agree before two scores may be compared, beside the name of the score.
_PROTOCOL = ("num_samples", "extractor_digest", "reference_digest", "preprocessing", "weights", "seed")


@dataclass(frozen=True)
class Cell:
    """A text, and what it is sorted by where that is a number; None sorts last."""

    text: str
    order: float | None = None
    is_number: bool = False


@dataclass(frozen=True)
class Table:
    """Heads and rows; one whose rows mean something in their order only is not sorted."""

    heads: list[str]
    rows: list[list[Cell]]
    is_sortable: bool = True


def higher_is_better(score: str) -> bool:
    """Whether more is better; every other score is a distance, or a loss."""
    return score.startswith(("is", "precision", "recall"))


def head(score: str) -> str:
    """Name of a score with its direction."""
    return f"{score} {'↑' if higher_is_better(score) else '↓'}"


def best(run: Run, score: str) -> tuple[int, float] | None:
    """Images seen and value of the best measurement of a run; None without one that is finite."""
    curve = [(place, value) for place, value in run.curve(score).items() if math.isfinite(value)]
    sign = -1 if higher_is_better(score) else 1
    return min(curve, key=lambda point: (sign * point[1], point[0]), default=None)


def finals(group: Group, score: str) -> list[float]:
    """The last score of each finished run, the diverged ones included."""
    return [value for run in group.finished if (value := run.final(score)) is not None]


def results_table(groups: Sequence[Group], scores: Sequence[str]) -> Table:
    """One row a group: mean and sample standard deviation over the finished runs."""
    axes = list(groups[0].axes)
    named = "trial" if is_search(groups) else "variant" if is_ablation(groups) else None
    names = [*([named] if named else []), *axes] or ["run"]
    rows = []
    for group in groups:
        first = [*([group.variant or "-"] if named else []), *group.axes.values()] or [group.label]
        seconds = [run.seconds for run in group.finished if run.seconds is not None]
        rows.append(
            [
                *map(setting_cell, first),
                *(score_cell(score, finals(group, score)) for score in scores),
                number_cell(float(len(group.finished))),
                _images_cell(group),
                _time_cell(mean(seconds) if seconds else None),
                Cell(_states(group.runs)),
            ]
        )
    return Table([*names, *map(head, scores), "n", "images seen", "wall time", "runs"], rows)


def runs_table(groups: Sequence[Group], scores: Sequence[str]) -> Table:
    """One row a run, finished or not."""
    rows = []
    for group in groups:
        for run in group.runs:
            marks = [cell for score in scores for cell in (_final_cell(run, score), _best_cell(run, score))]
            rows.append(
                [
                    Cell(run.folder),
                    Cell(group.label),
                    setting_cell("-" if run.seed is None else str(run.seed)),
                    Cell(run.told),
                    *marks,
                    number_cell(run.images_seen),
                    _time_cell(run.seconds),
                    Cell("; ".join(filter(None, [run.error, _damage(run)]))),
                ]
            )
    named = [name for score in scores for name in (head(score), "best in training")]
    return Table(["run", "settings", "seed", "state", *named, "images seen", "wall time", "error"], rows)


def changes_table(groups: Sequence[Group]) -> Table | None:
    """What each group changes; None where the axes of the results say it already."""
    against, listed = changes(groups)
    if not any(listed) or (not is_ablation(groups) and len(differences(groups)) <= len(groups[0].axes)):
        return None
    rows = [[Cell(group.label), Cell(_told_changes(entry))] for group, entry in zip(groups, listed, strict=True)]
    return Table(
        ["variant" if is_ablation(groups) else "settings", f"changes against {against}"], rows, is_sortable=False
    )


def remarks(study: Study, groups: Sequence[Group], scores: Sequence[str]) -> list[str]:
    """What a reader has to know before the numbers."""
    runs, said = study.runs, []
    finished = [run for run in runs if run.is_finished]
    if len(finished) < len(runs):
        others = _states([run for run in runs if not run.is_finished])
        said.append(f"{len(finished)} of {len(runs)} runs are finished; {others}. Means are over finished runs only.")
    if study.damage:
        said.append(f"Damaged: {', '.join(study.damage)}; the runs are those that lie in the folder.")
    if harmed := [run.folder for run in finished if run.damage]:
        said.append(f"Files of finished runs are damaged ({', '.join(harmed)}): see the table of runs.")
    for group in groups:
        seeds = [run.seed for run in group.runs]
        if len(set(map(str, seeds))) < len(seeds):
            said.append(f"{group.label}: runs of the same seed stand in one row; nothing in their settings differs.")
    budgets = sorted({run.images_seen for run in finished if run.images_seen is not None})
    if len(budgets) > 1:
        listed = ", ".join(f"{count:,}" for count in budgets[:5]) + (", ..." if len(budgets) > 5 else "")
        said.append(f"Finished runs saw different numbers of images ({listed}): compare them by their curves.")
    unlike = [name for name in _PROTOCOL if len({str(run.protocol.get(name)) for run in finished if run.protocol}) > 1]
    if unlike:
        said.append(f"Scores were measured with different {', '.join(unlike)}: they are not comparable.")
    diverged = [r.folder for r in finished if any(not math.isfinite(r.final(score) or 0.0) for score in scores)]
    if diverged:
        said.append(f"Ended with nan or inf: {', '.join(diverged)}. Means are over the others, and say so.")
    if study.scores == ["loss"]:
        said.append(
            "No scores were measured (callbacks=quality): the loss of the last logged steps stands in. It does not "
            "compare runs of different metric, weighting or curriculum."
        )
    if any(len(group.finished) == 1 for group in groups):
        said.append("Where n is 1 there is no spread: a difference may be one of seeds.")
    return said


def setting_cell(text: str) -> Cell:
    """A setting; numbers sort as numbers."""
    try:
        return Cell(text, float(text), is_number=True)
    except ValueError:
        return Cell(text)


def number_cell(value: float | None) -> Cell:
    """A count."""
    return Cell("-" if value is None else f"{value:,.0f}", value, is_number=True)


def score_cell(score: str, values: Sequence[float]) -> Cell:
    """`31.2 ± 4.1`; diverged values are named, and sort as worse than every number."""
    finite = [value for value in values if math.isfinite(value)]
    if not values:
        return Cell("-", None, is_number=True)
    text = _with_spread(finite) if len(finite) > 1 else figure(finite[0]) if finite else ""
    if len(finite) < len(values):
        lost = [value for value in values if not math.isfinite(value)]
        named = f"{len(lost)} {'nan' if any(map(math.isnan, lost)) else 'inf'}"
        return Cell(f"{text} (+{named})" if text else named, _worst(score), is_number=True)
    return Cell(text, mean(finite), is_number=True)


def _worst(score: str) -> float:
    return -math.inf if higher_is_better(score) else math.inf


def figure(value: float) -> str:
    """Three digits, or all before the point."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _with_spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation; two digits of the latter say how many of the former mean something."""
    spread = stdev(values)
    digits = min(max(1 - math.floor(math.log10(spread)), 0), 6) if spread > 0 else 3
    return f"{mean(values):,.{digits}f} ± {spread:,.{digits}f}"


def duration(seconds: float | None) -> str:
    """`52 s`, `4 min 12 s`, `3 h 05 min`."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def _time_cell(seconds: float | None) -> Cell:
    return Cell(duration(seconds), seconds, is_number=True)


def _images_cell(group: Group) -> Cell:
    seen = sorted({run.images_seen for run in group.finished if run.images_seen is not None})
    if len(seen) > 1:
        return Cell(f"{seen[0]:,} to {seen[-1]:,}", float(seen[-1]), is_number=True)
    return number_cell(seen[0] if seen else None)


def _final_cell(run: Run, score: str) -> Cell:
    value = run.final(score)
    if value is None:
        return Cell("-", None, is_number=True)
    return Cell(figure(value), value if math.isfinite(value) else _worst(score), is_number=True)


def _best_cell(run: Run, score: str) -> Cell:
    point = best(run, score)
    if point is None:
        return Cell("-", None, is_number=True)
    return Cell(f"{figure(point[1])} at {point[0]:,}", point[1], is_number=True)


def _states(runs: Sequence[Run]) -> str:
    """`2 finished, 1 unfinished at step 300`."""
    counted: dict[str, list[Run]] = {}
    for run in runs:
        counted.setdefault(run.state, []).append(run)
    parts = []
    for state in sorted(counted, key=lambda state: state != "finished"):
        same = counted[state]
        parts.append(f"{len(same)} {same[0].told if len(same) == 1 else state}")
    return ", ".join(parts)


def _damage(run: Run) -> str:
    return f"damaged: {', '.join(run.damage)}" if run.damage and run.state != "unreadable" else ""


def _told_changes(entry: list[tuple[str, str, str]] | None) -> str:
    if entry is None:
        return "not known: no run of it left its settings"
    return "; ".join(f"{key}: {before} → {after}" for key, before, after in entry) or "-"


def common_settings(groups: Sequence[Group]) -> list[tuple[str, Any]]:
    """Settings that are equal everywhere."""
    known = [group.settings for group in groups if group.settings is not None]
    first = known[0] if known else {}
    return [item for item in first.items() if all(settings.get(item[0]) == item[1] for settings in known)]
