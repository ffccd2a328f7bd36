"""Runs that differ in their seed only make a group; what tells the groups from each other."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from consistency.report.settings import UNKNOWN, Settings, compared_settings, numeric, shown, typed_for
from consistency.report.study import Run

_TRIAL = re.compile(r"trial\d+")  # what a search calls its runs: numbers, not names of choices


@dataclass
class Group:
    """Runs of equal settings, and the settings as they compare; None where no run says them."""

    runs: list[Run]
    settings: Settings | None
    label: str = ""
    axes: dict[str, str] = field(default_factory=dict)  # what was varied -> its value here

    @property
    def variant(self) -> str | None:
        """Its name in an ablation."""
        return self.runs[0].variant

    @property
    def finished(self) -> list[Run]:
        """The runs that enter means."""
        return [run for run in self.runs if run.is_finished]


def make_groups(runs: Sequence[Run]) -> list[Group]:
    """Group runs, in the order of their first one, and give each group what was varied and a label of its own.

    A run without settings (never started, cannot be composed, damaged) joins the group of what was typed for it.
    """
    groups: list[Group] = []
    compared = compared_settings(runs)
    by_settings: dict[Any, Group] = {}
    by_typed: dict[Any, Group] = {}
    for run, settings in sorted(zip(runs, compared, strict=True), key=lambda pair: pair[1] is None):
        typed = _asked(run)
        key = None if settings is None else (run.variant, json.dumps(sorted(settings.items())))
        group = by_typed.get(typed) if key is None else by_settings.get(key)
        if group is None:
            group = Group([], settings)
            groups.append(group)
        group.runs.append(run)
        by_typed.setdefault(typed, group)
        if key is not None:
            by_settings[key] = group
    place = {run.folder: index for index, run in enumerate(runs)}
    for group in groups:
        group.runs.sort(key=lambda run: place[run.folder])
    groups.sort(key=lambda group: place[group.runs[0].folder])
    _describe(groups)
    return groups


def is_search(groups: Sequence[Group]) -> bool:
    """Whether the groups are trials of a search: points in a space, and not variants with a meaning of their own."""
    return all(group.variant is not None and _TRIAL.fullmatch(group.variant) for group in groups)


def is_ablation(groups: Sequence[Group]) -> bool:
    """Whether there are variants with names."""
    return any(group.variant is not None for group in groups) and not is_search(groups)


def differences(groups: Sequence[Group]) -> list[str]:
    """Settings that are not equal in all groups that have settings; one of several that only repeat each other."""
    known = [group.settings for group in groups if group.settings is not None]
    keys = list(dict.fromkeys(key for settings in known for key in settings))
    kept: dict[tuple[str, str], str] = {}
    for key in sorted(keys, key=lambda key: key.count(".")):
        values = [settings.get(key) for settings in known]
        if any(value != values[0] for value in values):
            kept.setdefault((key.rpartition(".")[2], json.dumps(values)), key)
    return [key for key in keys if key in kept.values()]


def changes(groups: Sequence[Group]) -> tuple[str, list[list[tuple[str, str, str]] | None]]:
    """What each group changes: (setting, before, after), against the first one or the one before it.

    Returns:
        `the row above` or `the first row`, whichever makes the shorter list; for each group its changes, None where
        its settings are not known.
    """
    keys = differences(groups)
    against: dict[str, list[list[tuple[str, str, str]] | None]] = {"the first row": [], "the row above": []}
    first = next((group.settings for group in groups if group.settings is not None), {})
    above = first
    for group in groups:
        for what, reference in (("the first row", first), ("the row above", above)):
            against[what].append(None if group.settings is None else _changed(keys, reference or {}, group.settings))
        above = above if group.settings is None else group.settings
    what = min(against, key=lambda name: sum(len(listed or ()) for listed in against[name]))
    return what, against[what]


def _changed(keys: Sequence[str], before: Settings, after: Settings) -> list[tuple[str, str, str]]:
    different = [key for key in keys if before.get(key) != after.get(key)]
    # What goes with the part that had it says nothing of its own: `metric.c` of a metric that is another one now.
    gone = [key for key in different if key not in after and any(key.startswith(f"{part}.") for part in different)]
    return [(key, *_pair(before.get(key), after.get(key))) for key in different if key not in gone]


def _pair(before: Any, after: Any) -> tuple[str, str]:
    """Two different values, told apart."""
    return (shown(before), shown(after)) if shown(before) != shown(after) else (str(before), str(after))


def _asked(run: Run) -> Any:
    """What was asked for, apart from the seed; a run of which nothing is known stands for itself."""
    typed = frozenset(typed_for(run.overrides, axes_only=run.variant is not None).items())
    return (run.variant, typed) if run.overrides else run.folder


def _describe(groups: list[Group]) -> None:
    """Axes and labels."""
    typed_columns = _typed_axes(groups)
    columns = _settings_axes(groups) if typed_columns is None else typed_columns
    names = short_names(list(columns))
    typed = [typed_for(group.runs[0].overrides, axes_only=not is_search(groups)) for group in groups]
    taken: dict[str, int] = {}
    for index, group in enumerate(groups):
        group.axes = {key: _brief(values[index]) for key, values in columns.items()}
        parts = [f"{name}={value}" for name, value in zip(names, group.axes.values(), strict=True)]
        if group.settings is None and typed_columns is None:
            own = [item for item in typed[index].items() if not all(item in other.items() for other in typed)]
            parts = ["=".join(item) for item in own]
        if group.variant is not None:
            parts = [group.variant] if is_search(groups) else [group.variant, *parts]
        experiment = typed[index].get("experiment") if len(groups) == 1 else None
        label = ", ".join(parts) or experiment or group.runs[0].folder
        taken[label] = taken.get(label, 0) + 1
        group.label = label if taken[label] == 1 else f"{label} ({taken[label]})"


def _brief(value: str) -> str:
    """A number that was drawn by chance has more digits than anyone reads."""
    return f"{float(value):.4g}" if len(value) > 8 and numeric([value]) else value


def short_names(keys: Sequence[str]) -> list[str]:
    """`optimizer.lr` -> `lr` where no other key ends so."""
    ends = [key.rpartition(".")[2] for key in keys]
    return [end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)]


def _typed_axes(groups: Sequence[Group]) -> dict[str, list[str]] | None:
    """Axes in the user's own words, where the same were typed for all groups and tell them apart; else None."""
    typed = [typed_for(group.runs[0].overrides, axes_only=not is_search(groups)) for group in groups]
    if any(entry.keys() != typed[0].keys() for entry in typed):
        return None
    columns = {key: [entry[key] for entry in typed] for key in typed[0]}
    columns = {key: values for key, values in columns.items() if _differs(groups, values)}
    points = [(group.variant, *(values[i] for values in columns.values())) for i, group in enumerate(groups)]
    return columns if len(set(points)) == len(points) else None


def _settings_axes(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Axes as settings; those that a part brings along (`metric.resize` of `metric`) are left out."""
    columns: dict[str, list[str]] = {}
    for key in differences(groups):
        values = [UNKNOWN if group.settings is None else shown(group.settings.get(key)) for group in groups]
        part = key.partition(".")[0]
        brought = any(_follows(values, other) for name, other in columns.items() if name.partition(".")[0] == part)
        if _differs(groups, values) and not brought:
            columns[key] = values
    return columns


def _follows(values: Sequence[str], other: Sequence[str]) -> bool:
    """Whether one column says all that the other does."""
    return len(set(zip(other, values, strict=True))) == len(set(other))


def _differs(groups: Sequence[Group], values: Sequence[str]) -> bool:
    """Whether values differ among groups of the same variant; what tells variants apart is their name."""
    seen: dict[str | None, set[str]] = {}
    for group, value in zip(groups, values, strict=True):
        if value != UNKNOWN:
            seen.setdefault(None if is_search(groups) else group.variant, set()).add(value)
    return any(len(different) > 1 for different in seen.values())
