"""The final scores against what was varied: bars for names, lines for numbers, every run as a dot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from consistency.report.figures import Picture, featured, png, set_scale, short
from consistency.report.groups import Group, differences, is_ablation, is_search
from consistency.report.settings import numeric, shown
from consistency.report.tables import finals, head

_MAX_BARS, _MAX_SERIES = 24, 8


class Choice(NamedTuple):
    """What was varied, its value in each group, and the rest of what was varied as a name of a series."""

    name: str
    groups: list[Group]
    values: list[str]
    series: list[str]
    is_grid: bool = True  # else points are not connected: other settings differ between them too


def choices_of(groups: Sequence[Group], score: str) -> list[Choice]:
    """One choice for each axis of a grid; one of all groups where there is no grid."""
    if len(groups) < 2:
        return []
    axes = list(groups[0].axes)
    if is_ablation(groups) and not axes and (single := _single_number(groups)) is not None:
        return [Choice(single[0], list(groups), single[1], [""] * len(groups))]
    is_grid = math.prod(len({group.axes[key] for group in groups}) for key in axes) == len(groups)
    found = [_choice(groups, key) for key in axes] if not is_ablation(groups) else []
    if found and is_grid and all(len(set(choice.series)) <= _MAX_SERIES for choice in found):
        return found
    chosen = featured(groups, score, _MAX_BARS)
    name = "trial" if is_search(groups) else "variant" if is_ablation(groups) else "settings"
    scattered = [
        choice._replace(series=[""] * len(groups), is_grid=False)
        for choice in found
        if numeric(choice.values) is not None and len(set(choice.values)) > 2
    ]
    if len(scattered) == len(axes) > 0 and len(groups) > _MAX_BARS:
        return scattered  # a search: what it found is in the table, to be sorted
    return [*scattered, Choice(name, chosen, [group.label for group in chosen], [""] * len(chosen))]


def draw_choice(choice: Choice, scores: Sequence[str], file: str) -> Picture | None:
    """The final scores of a choice, one panel a score; None where no finished run has one."""
    from matplotlib.figure import Figure

    scores = [score for score in scores if any(finals(group, score) for group in choice.groups)]
    if not scores:
        return None
    numbers = numeric(choice.values)
    names = list(dict.fromkeys(choice.series))
    is_lines = numbers is not None and len(set(numbers)) > 1
    columns, rows = min(len(scores), 2), -(-len(scores) // 2)
    height = 3.2 if is_lines else 1.1 + 0.3 * len(choice.groups)
    figure = Figure(figsize=(4.6 * columns + (1.2 if len(names) > 1 else 0), height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=not is_lines and "row").flat
    for axes, score in zip(panels, scores, strict=False):
        if is_lines and numbers is not None:
            _draw_lines(axes, choice, numbers, score)
        else:
            _draw_bars(axes, choice, score)
    for axes in list(panels)[len(scores) :]:
        axes.set_visible(False)
    if len(names) > 1:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    bars = "Lines" if is_lines else "Bars"
    caption = f"{bars}: means at the end of training, with sample standard deviations. Dots: finished runs."
    if not choice.is_grid:
        caption = "Dots: finished runs at the end of training; other settings differ between them too."
    return Picture(file, png(figure), f"final scores by {choice.name}", caption)


def _choice(groups: Sequence[Group], key: str) -> Choice:
    others = [", ".join(f"{name}={value}" for name, value in g.axes.items() if name != key) for g in groups]
    return Choice(key, list(groups), [group.axes[key] for group in groups], others)


def _single_number(groups: Sequence[Group]) -> tuple[str, list[str]] | None:
    """The one setting in which variants differ, if it is a number in all of them."""
    keys = differences(groups)
    if len(keys) != 1 or any(group.settings is None for group in groups):
        return None
    values = [shown((group.settings or {}).get(keys[0])) for group in groups]
    return (keys[0], values) if numeric(values) is not None else None


def _draw_bars(axes: Any, choice: Choice, score: str) -> None:
    """Bars from left to right, the first value on top; series side by side."""
    import matplotlib

    values, names = list(dict.fromkeys(choice.values)), list(dict.fromkeys(choice.series))
    wheel = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    thick = 0.75 / len(names)
    everything: list[float] = []
    labelled: set[str] = set()
    for group, value, name in zip(choice.groups, choice.values, choice.series, strict=True):
        place = values.index(value) + (names.index(name) - (len(names) - 1) / 2) * thick
        measured = finals(group, score)
        finite = [entry for entry in measured if math.isfinite(entry)]
        everything += finite
        colour = wheel[names.index(name) % len(wheel)]
        if finite:
            label = "_" if name in labelled else short(name)
            labelled.add(name)
            axes.barh(place, mean(finite), thick * 0.9, color=colour, alpha=0.55, label=label)
            axes.errorbar(mean(finite), place, xerr=_spread(finite), color="0.2", capsize=2, linewidth=1, zorder=3)
            axes.plot(finite, [place] * len(finite), "o", color="0.2", markersize=3, alpha=0.7, zorder=4)
        _say_missing(axes, place, measured, finite)
    set_scale(axes, "x", everything)
    if axes.get_xscale() == "log":
        axes.set_xlim(left=min(everything) / 2)
    axes.set_yticks(range(len(values)), [short(value) for value in values], fontsize=8)
    axes.set(xlabel=head(score), ylim=(len(values) - 0.4, -0.6))
    axes.grid(alpha=0.25, axis="x")


def _say_missing(axes: Any, place: float, measured: Sequence[float], finite: Sequence[float]) -> None:
    """Beside a bar, or in its place: runs that it does not hold."""
    if measured and len(finite) == len(measured):
        return
    lost = f"{len(measured) - len(finite)} of {len(measured)} diverged" if measured else "no finished run"
    at, frame = ((max(finite), place), "data") if finite else ((0, place), ("axes fraction", "data"))
    axes.annotate(f"  {lost}", at, xycoords=frame, va="center", fontsize=7, color="0.35")


def _draw_lines(axes: Any, choice: Choice, numbers: Sequence[float], score: str) -> None:
    """Means against a number, one line a series; seeds as dots."""
    import matplotlib

    names = list(dict.fromkeys(choice.series))
    wheel = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    marks = sorted(set(numbers))
    # 0 has no place on a logarithmic axis: then the values stand at equal distances.
    is_ranked = min(marks) <= 0 and len(marks) > 2 and marks[-1] > 20 * min(abs(mark) for mark in marks if mark)
    everything: list[float] = []
    for index, name in enumerate(names):
        points = []
        for group, number, series in zip(choice.groups, numbers, choice.series, strict=True):
            finite = [value for value in finals(group, score) if math.isfinite(value)]
            if series == name and finite:
                points.append((marks.index(number) if is_ranked else number, finite))
        points.sort(key=lambda point: point[0])
        colour = wheel[index % len(wheel)]
        everything += [value for _, finite in points for value in finite]
        if choice.is_grid and points:
            x, means = [place for place, _ in points], [mean(finite) for _, finite in points]
            errors = [_spread(finite) or 0.0 for _, finite in points]
            axes.errorbar(x, means, yerr=errors, color=colour, capsize=3, linewidth=1.4, label=short(name))
        for place, finite in points:
            axes.plot([place] * len(finite), finite, "o", color=colour, markersize=3.5, alpha=0.6)
    set_scale(axes, "y", everything)
    if not is_ranked:
        set_scale(axes, "x", marks)
    if len(marks) <= 8:
        axes.set_xticks(range(len(marks)) if is_ranked else marks, [f"{mark:g}" for mark in marks])
        axes.minorticks_off() if axes.get_xscale() == "log" and axes.get_yscale() != "log" else None
    axes.set(xlabel=choice.name, ylabel=head(score))
    axes.grid(alpha=0.25)


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None
