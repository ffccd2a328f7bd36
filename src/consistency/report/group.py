"""Runs that differ in their seed only make a group; what tells the groups from each other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from consistency.config import is_neutral
from consistency.report.load import Study

_IDENTITY = ("seed", "variant")  # beside the neutral settings
_HYDRA = ("_partial_", "_convert_", "_recursive_")
_TRIAL = r"trial\d+"  # what a search calls its runs: numbers, not names of choices
_MAX_AXES = 6  # more settings than this do not name a group
# A setting that is null or absent; one of runs that left no settings; one that was typed for other groups only.
NONE, UNKNOWN, ABSENT = "none", "?", "-"


@dataclass(frozen=True)
class Groups:
    """The groups of a study, in the order of their first run.

    Attributes:
        kind: `trial` of a search, `variant` of an ablation, else `run`.
        runs: `Study.runs` with the label of each run's group as a column, `group`.
        finals: `Study.finals` of the finished runs, with the column `group`.
        axes: One row a group, by its label; the columns are what was varied, the cells its value.
        settings: One row a group whose settings are there; the columns are `metric._target_`, `optimizer.lr`, ...
        typed: One row a group; the columns are what was typed for its runs and changes their result.
    """

    kind: Literal["trial", "variant", "run"]
    runs: pd.DataFrame
    finals: pd.DataFrame
    axes: pd.DataFrame
    settings: pd.DataFrame
    typed: pd.DataFrame

    @property
    def labels(self) -> list[str]:
        """Of all groups."""
        return list(self.axes.index)

    def of(self, label: str) -> pd.DataFrame:
        """The runs of a group."""
        return self.runs[self.runs["group"] == label]


def make_groups(study: Study) -> Groups:
    """Group the runs of a study, and name each group by what was varied.

    A run without settings (never started, cannot be composed, damaged) joins the group of what was typed for it.
    """
    runs = study.runs
    settings = compared_settings(runs)
    numbers = _group_numbers(runs, settings)
    firsts = runs[~numbers.duplicated()]
    variants = firsts["variant"]
    is_search = variants.notna().all() and variants.str.fullmatch(_TRIAL).all()
    kind: Any = "trial" if is_search else "variant" if variants.notna().any() else "run"
    settings = settings.assign(number=numbers).drop_duplicates("number").set_index("number")
    typed = pd.DataFrame([typed_for(run, axes_only=kind != "trial") for run in firsts.itertuples()], index=firsts.index)
    axes, labels = _describe(firsts, typed, settings.set_axis(firsts.index[settings.index]), kind)
    runs = runs.assign(group=[labels[number] for number in numbers])
    finished = runs.loc[runs["state"] == "finished", "group"]
    finals = study.finals[study.finals["run"].isin(finished.index)]
    own = pd.DataFrame([typed_for(run) for run in firsts.itertuples()], index=labels)
    return Groups(
        kind=kind,
        runs=runs,
        finals=finals.assign(group=finals["run"].map(finished)),
        axes=axes.set_axis(labels),
        settings=settings.set_axis([labels[number] for number in settings.index]),
        typed=own,
    )


def _group_numbers(runs: pd.DataFrame, settings: pd.DataFrame) -> pd.Series:
    """Run -> the number of its group; groups are numbered in the order of their first run."""
    keys: dict[str, Any] = {}
    by_typed: dict[Any, Any] = {}
    for run in runs.sort_values("config", key=pd.isna, kind="stable").itertuples():
        asked = (run.variant, frozenset(typed_for(run, axes_only=run.variant is not None).items()))
        typed = asked if run.overrides else run.run  # a run of which nothing is there stands for itself
        own = (run.variant, tuple(settings.loc[run.run].fillna(NONE))) if run.run in settings.index else None
        keys[run.run] = own if own is not None else by_typed.get(typed, typed)
        by_typed.setdefault(typed, keys[run.run])
    codes, _ = pd.factorize(pd.Series([keys[name] for name in runs.index], dtype=object))
    return pd.Series(codes, index=runs.index)


def compared_settings(runs: pd.DataFrame) -> pd.DataFrame:
    """The settings that make the result, as text: without seed, names, paths, and what repeats other settings.

    Returns:
        One row a run that left its settings; a column `metric._target_` for a part, `metric.c` for one of its settings.
    """
    having: dict[str, set[str | None]] = {}
    configured = runs[runs["config"].notna()]
    for run in configured.itertuples():
        for key in run.config:
            parts = key.split(".")
            prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
            repeated = next((run.references[prefix] for prefix in prefixes if prefix in run.references), None)
            having.setdefault(key, set()).add(repeated)
    # Where runs repeat different settings, as `${curriculum.start}` and `${curriculum.end}`, that is a difference.
    repeats = {key for key, repeated in having.items() if len(repeated) == 1 and None not in repeated}
    rows = [_own_settings(run, repeats) for run in configured.itertuples()]
    return pd.DataFrame(rows, index=configured.index, dtype=object)


def _own_settings(run: Any, repeats: set[str]) -> dict[str, str]:
    folder, own = run.config.get("paths.output_dir"), {}
    for key, value in run.config.items():
        name = key.rpartition(".")[2]
        if value is None or key in repeats or key in _IDENTITY or name in _HYDRA or is_neutral(key):
            continue
        # Runs without .hydra/ say no references: a seed that is the run's, a file in the run's directory.
        if (name == "seed" and str(value) == run.seed) or (folder and isinstance(value, str) and str(folder) in value):
            continue
        own[key] = text_of(value)
    return own


def text_of(value: Any) -> str:
    """A setting as text: 1 and 1.0 are equal."""
    if value is None:
        return NONE
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.12g}" if abs(value) < 1e300 else str(value)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def typed_for(run: Any, *, axes_only: bool = False) -> dict[str, str]:
    """What was typed for a run and changes its result; `axes_only`: without what its variant sets."""
    typed: dict[str, str] = {}
    for entry in run.overrides:
        key, _, value = entry.lstrip("+~").partition("=")
        if axes_only and key == "variant":
            break
        if key not in _IDENTITY and not is_neutral(key) and not key.startswith("hydra"):
            typed[key] = value
    return typed


def differences(settings: pd.DataFrame) -> pd.DataFrame:
    """The columns that are not equal in all rows, as they are shown; one of several that only repeat each other."""
    varied = settings.loc[:, settings.nunique(dropna=False) > 1].fillna(NONE)
    kept: dict[Any, str] = {}
    for key in sorted(varied, key=lambda key: key.count(".")):
        kept.setdefault((key.rpartition(".")[2], *varied[key]), key)
    return readable(varied[[key for key in varied if key in kept.values()]])


def readable(settings: pd.DataFrame) -> pd.DataFrame:
    """Parts by the last name of their path, where this tells them apart: `metric`: `l2`."""
    shown = settings.copy()
    for key in shown.columns[shown.columns.str.endswith("_target_")] if len(shown.columns) else ():
        brief = shown[key].str.rpartition(".")[2]
        shown[key] = brief if brief.nunique() == shown[key].nunique() else shown[key]
    return shown.rename(columns=lambda key: key.removesuffix("._target_"))


def changes(groups: Groups) -> tuple[str, dict[str, list[str]]]:
    """What each group changes: `optimizer.lr: 0.01 → 0.001`, against the first one or the one before it.

    Returns:
        `the first row` or `the row above`, whichever makes the shorter list; the changes of each group with settings.
    """
    different = differences(groups.settings)
    rows = [row for _, row in different.iterrows()]
    references = {"the first row": rows[:1] * len(rows), "the row above": [*rows[:1], *rows[:-1]]}
    lists = {name: [_changed(*pair) for pair in zip(before, rows, strict=True)] for name, before in references.items()}
    against = min(lists, key=lambda name: sum(map(len, lists[name])))
    return against, dict(zip(different.index, lists[against], strict=True))


def _changed(before: pd.Series, after: pd.Series) -> list[str]:
    keys = before.index[before != after]
    # What goes with the part that had it says nothing of its own: `metric.c` of a metric that is another one now.
    gone = [key for key in keys if after[key] == NONE and any(key.startswith(f"{part}.") for part in keys)]
    return [f"{key}: {before[key]} → {after[key]}" for key in keys if key not in gone]


def _describe(
    firsts: pd.DataFrame, typed: pd.DataFrame, settings: pd.DataFrame, kind: str
) -> tuple[pd.DataFrame, list[str]]:
    """Axes and labels of groups; all frames are by the folder of the first run of each group."""
    variants = pd.Series("", firsts.index) if kind == "trial" else firsts["variant"].fillna("")
    axes, chosen = _settings_axes(settings, variants), _typed_axes(typed, variants)
    is_typed = False
    if chosen is not None and (typed.notna().all(axis=None) or axes.shape[1] > _MAX_AXES):
        axes, is_typed = chosen, True
    axes = axes.map(_brief)
    names, labels = short_names(axes.columns), list[str]()
    for run in firsts.itertuples():
        values = zip(names, axes.loc[run.run], strict=True)
        parts = [value if name == "experiment" else f"{name}={value}" for name, value in values if value != ABSENT]
        if run.run not in settings.index and not is_typed:
            own = typed.loc[run.run].dropna()
            parts = [f"{key}={value}" for key, value in own.items() if not (typed[key] == value).all()]
        if run.variant is not None:
            parts = [run.variant] if kind == "trial" else [run.variant, *parts]
        experiment = typed_for(run).get("experiment") if len(firsts) == 1 else None
        label = ", ".join(parts) or experiment or run.run
        count = sum(re.sub(r" \(\d+\)$", "", taken) == label for taken in labels)
        labels.append(f"{label} ({count + 1})" if count else label)
    return axes, labels


def _brief(value: str) -> str:
    """A number that was drawn by chance has more digits than anyone reads."""
    return f"{float(value):.4g}" if len(value) > 8 and numbers_in([value]) is not None else value


def short_names(keys: Iterable[str]) -> list[str]:
    """`optimizer.lr` -> `lr` where no other key ends so."""
    keys = list(keys)
    ends = [key.rpartition(".")[2] for key in keys]
    return [end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)]


def _typed_axes(typed: pd.DataFrame, variants: pd.Series) -> pd.DataFrame | None:
    """Axes in the user's own words, where they tell the groups apart; else None."""
    typed = typed.fillna(ABSENT)
    axes = typed[[key for key in typed if _differs(typed[key], variants)]]
    return None if axes.assign(variant=variants).duplicated().any() else axes


def _settings_axes(settings: pd.DataFrame, variants: pd.Series) -> pd.DataFrame:
    """Axes as settings; those that a part brings along (`metric.resize` of `metric`) are left out."""
    different = differences(settings)
    kept: list[str] = []
    for key in different:
        same_part = [other for other in kept if other.partition(".")[0] == key.partition(".")[0]]
        is_brought = any((different.groupby(other)[key].nunique() == 1).all() for other in same_part)
        if not is_brought and _differs(different[key], variants):
            kept.append(key)
    return different[kept].reindex(variants.index).fillna(UNKNOWN)


def _differs(values: pd.Series, variants: pd.Series) -> bool:
    """Whether values differ among groups of the same variant; what tells variants apart is their name."""
    return bool((values.groupby(variants.loc[values.index]).nunique() > 1).any())


def numbers_in(values: Iterable[str]) -> list[float] | None:
    """The values as finite numbers; None if one is none."""
    numbers = pd.to_numeric(pd.Series(list(values), dtype=object), errors="coerce").astype(float)
    return list(numbers) if (numbers.abs() < float("inf")).all() else None
