"""Tables and remarks: numbers with the number of runs behind them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from consistency.report.group import Groups, changes, differences, numbers_in
from consistency.report.load import Study

# What must agree before two scores may be compared, beside the name of the score.
_PROTOCOL = ("num_samples", "extractor_digest", "reference_digest", "preprocessing", "weights", "seed")
EMPTY = "-"


class Cell(NamedTuple):
    """A text, and the number that it is sorted by; None sorts last."""

    text: str
    order: float | None = None


@dataclass(frozen=True)
class Table:
    """Heads and rows; one whose rows mean something in their order only is not sorted."""

    heads: list[str]
    rows: list[list[Cell]]
    is_sortable: bool = True

    @property
    def are_numbers(self) -> list[bool]:
        """Which columns hold numbers alone, and stand to the right."""
        columns = zip(*self.rows, strict=True)
        return [all(cell.order is not None or cell.text == EMPTY for cell in column) for column in columns]


def higher_is_better(score: str) -> bool:
    """Whether more is better; every other score is a distance, or a loss."""
    return score.startswith(("is", "precision", "recall"))


def head(score: str) -> str:
    """Name of a score with its direction."""
    return f"{score} {'↑' if higher_is_better(score) else '↓'}"


def of_score(frame: pd.DataFrame, score: str, **where: str) -> pd.Series:
    """The values of a score, of one `group` or `run` if that is given."""
    chosen = frame["score"] == score
    for column, wanted in where.items():
        chosen &= frame[column] == wanted
    return frame.loc[chosen, "value"]


def finite(values: pd.Series) -> pd.Series:
    """Without nan and inf."""
    return values[np.isfinite(values)]


def results_table(groups: Groups, scores: Sequence[str]) -> Table:
    """One row a group: mean and sample standard deviation over the finished runs."""
    rows = []
    for label, axes in groups.axes.iterrows():
        runs = groups.of(label)
        done = runs[runs["state"] == "finished"]
        first = [text(runs["variant"].iloc[0])] if groups.kind != "run" else [] if len(axes) else [label]
        seen, seconds = done["images_seen"].dropna(), done["seconds"].mean()
        images = f"{seen.min():,.0f} to {seen.max():,.0f}" if seen.nunique() > 1 else count(seen.max())
        rows.append(
            [
                *map(setting_cell, [*first, *axes]),
                *(score_cell(score, of_score(groups.finals, score, group=label)) for score in scores),
                Cell(str(len(done)), len(done)),
                Cell(images, _order(seen.max())),
                Cell(duration(seconds), _order(seconds)),
                Cell(states(runs)),
            ]
        )
    names = [groups.kind] * (groups.kind != "run" or groups.axes.empty) + list(groups.axes)
    return Table([*names, *map(head, scores), "n", "images seen", "wall time", "runs"], rows)


def runs_table(study: Study, groups: Groups, scores: Sequence[str]) -> Table:
    """One row a run, finished or not."""
    rows = []
    for run in groups.runs.itertuples():
        measured = []
        for score in scores:
            final = of_score(study.finals, score, run=run.run)
            curve = study.curves[(study.curves["run"] == run.run) & (study.curves["score"] == score)]
            measured += [score_cell(score, final), _best_cell(score, curve)]
        damage = f"damaged: {', '.join(run.damage)}" if run.damage and run.state != "unreadable" else ""
        rows.append(
            [
                Cell(run.run),
                Cell(run.group),
                setting_cell(text(run.seed)),
                Cell(state(run)),
                *measured,
                Cell(count(run.images_seen), _order(run.images_seen)),
                Cell(duration(run.seconds), _order(run.seconds)),
                Cell("; ".join(filter(None, [run.error, damage]))),
            ]
        )
    named = [name for score in scores for name in (head(score), "best in training")]
    return Table(["run", "settings", "seed", "state", *named, "images seen", "wall time", "error"], rows)


def changes_table(groups: Groups) -> Table | None:
    """What each group changes, as it was typed and in its settings; None where the axes of the results say it."""
    against, changed = changes(groups)
    is_ablation = groups.kind == "variant"
    if not any(changed.values()) or (not is_ablation and differences(groups.settings).shape[1] <= groups.axes.shape[1]):
        return None
    rows = []
    for label, typed in groups.typed.iterrows():
        words = " ".join(f"{key}={value}" for key, value in typed.dropna().items() if key != "experiment")
        listed = "; ".join(changed[label]) if label in changed else "not known: no run of it left its settings"
        rows.append([Cell(label), Cell(words or EMPTY), Cell(listed or EMPTY)])
    heads = ["variant" if is_ablation else "settings", "typed", f"changes against {against}"]
    return Table(heads, rows, is_sortable=False)


def remarks(study: Study, groups: Groups, scores: Sequence[str]) -> list[str]:
    """What a reader has to know before the numbers."""
    runs, lines = groups.runs, []
    finished = runs[runs["state"] == "finished"]
    if len(finished) < len(runs):
        others = states(runs[runs["state"] != "finished"])
        lines.append(f"{len(finished)} of {len(runs)} runs are finished; {others}. Means are over finished runs only.")
    if study.damage:
        lines.append(f"Damaged: {', '.join(study.damage)}; the runs are those that lie in the folder.")
    if len(harmed := finished[finished["damage"].astype(bool)]):
        lines.append(f"Files of finished runs are damaged ({', '.join(harmed.index)}): see the table of runs.")
    repeated = runs.loc[runs.duplicated(["group", "seed"]), "group"].unique()
    lines += [
        f"{label}: runs of the same seed stand in one row; nothing in their settings differs." for label in repeated
    ]
    budgets = sorted(finished["images_seen"].dropna().unique())
    if len(budgets) > 1:
        listed = ", ".join(map(count, budgets[:5])) + (", ..." if len(budgets) > 5 else "")
        lines.append(f"Finished runs saw different numbers of images ({listed}): compare them by their curves.")
    protocols = [protocol for protocol in finished["protocol"] if protocol]
    unlike = [name for name in _PROTOCOL if len({str(protocol.get(name)) for protocol in protocols}) > 1]
    if unlike:
        lines.append(f"Scores were measured with different {', '.join(unlike)}: they are not comparable.")
    shown = groups.finals[groups.finals["score"].isin(scores)]
    if len(diverged := shown.loc[~np.isfinite(shown["value"]), "run"].unique()):
        lines.append(f"Ended with nan or inf: {', '.join(diverged)}. Means are over the others, and say so.")
    if study.scores == ["loss"]:
        lines.append(
            "No scores were measured (callbacks=quality): the loss of the last logged steps stands in. It does not "
            "compare runs of different metric, weighting or curriculum."
        )
    if (finished["group"].value_counts() == 1).any():
        lines.append("Where n is 1 there is no spread: a difference may be one of seeds.")
    return lines


def setting_cell(value: str) -> Cell:
    """A setting; numbers sort as numbers."""
    numbers = numbers_in([value])
    return Cell(value, numbers[0] if numbers else None)


def score_cell(score: str, values: pd.Series) -> Cell:
    """`31.2 ± 4.1`; diverged values are named, and sort as worse than every number."""
    if not len(values):
        return Cell(EMPTY)
    kept = finite(values)
    shown = _with_spread(kept) if len(kept) > 1 else figure(kept.iloc[0]) if len(kept) else ""
    if len(kept) == len(values):
        return Cell(shown, kept.mean())
    named = f"{len(values) - len(kept)} {'nan' if values.isna().any() else 'inf'}"
    return Cell(f"{shown} (+{named})" if shown else named, -math.inf if higher_is_better(score) else math.inf)


def _best_cell(score: str, curve: pd.DataFrame) -> Cell:
    """The best measurement of a run, and where it was."""
    curve = curve[np.isfinite(curve["value"])].sort_values("images_seen")
    if curve.empty:
        return Cell(EMPTY)
    best = curve.loc[curve["value"].idxmax() if higher_is_better(score) else curve["value"].idxmin()]
    return Cell(f"{figure(best['value'])} at {count(best['images_seen'])}", best["value"])


def figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _with_spread(values: pd.Series) -> str:
    """Mean and sample standard deviation; two digits of the latter say how many of the former mean something."""
    spread = values.std()
    digits = min(max(1 - math.floor(math.log10(spread)), 0), 6) if 0 < spread < math.inf else 3
    return f"{values.mean():,.{digits}f} ± {spread:,.{digits}f}"


def text(value: object) -> str:
    """A text of a run that may be missing."""
    return EMPTY if value is None or value != value else str(value)


def count(value: float) -> str:
    """A number of images or steps."""
    return f"{value:,.0f}" if math.isfinite(value) else EMPTY


def _order(value: float) -> float | None:
    return value if math.isfinite(value) else None


def duration(seconds: float) -> str:
    """`52 s`, `4 min 12 s`, `3 h 05 min`."""
    if not math.isfinite(seconds):
        return EMPTY
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def state(run: pd.Series) -> str:
    """The state of a run in words: `unfinished at step 300`."""
    if run.state == "unreadable":
        return f"unreadable: {', '.join(run.damage)}"
    has_place = run.state not in ("finished", "not started") and math.isfinite(run.step)
    return f"{run.state} at step {count(run.step)}" if has_place else run.state


def states(runs: pd.DataFrame) -> str:
    """`2 finished, 1 unfinished at step 300`."""
    order: Iterable[str] = sorted(runs["state"].unique(), key=lambda name: name != "finished")
    same = [runs[runs["state"] == name] for name in order]
    return ", ".join(f"{len(of)} {state(of.iloc[0]) if len(of) == 1 else of.iloc[0]['state']}" for of in same)
