"""Curves against images seen, final scores by what was varied, sample grids side by side; each as a small PNG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from consistency.report.group import Groups, numbers_in
from consistency.report.tables import finite, head, higher_is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from consistency.report.load import Study

MAX_BYTES = 95_000  # of a picture: reports are committed
MAX_COLOURED, MAX_NAMED, _MAX_SERIES = 12, 24, 8  # groups of a colour, names beside an axis, lines of a choice
_MAX_POINTS = 200  # of a curve
_WIDE = 20.0  # a range of more than this factor gets a logarithmic axis
_FRAME, _MAX_ROWS, _GRID_WIDTH = 2, 10, 528  # of a sample grid: pixels between images, rows, pixels of a row


@dataclass(frozen=True)
class Picture:
    """A PNG beside the report, what it shows in a word, and its caption."""

    file: str
    alt: str
    caption: str
    data: bytes


def pictures(study: Study, groups: Groups, scores: Sequence[str]) -> dict[str, list[Picture]]:
    """The figures by their section; what there is nothing to draw of is left out."""
    measured = [score for score in scores if score != "loss"]
    sections = {
        "Final scores by what was varied": [*choices(groups, scores)],
        "Scores while training": [curve for score in measured for curve in curves(study, groups, score)],
        "Samples": [*samples(groups, scores)],
        "Loss": [*curves(study, groups, "loss")],
    }
    names: set[str] = set()
    for drawn in sections.values():
        for index, picture in enumerate(drawn):
            # Names come out of files, and `a/b` and `a_b` would share one.
            name = stem = re.sub(r"[^A-Za-z0-9.-]+", "_", picture.file).strip("._")
            name = f"{stem}-{len(names)}" if name.lower() in names else name
            names.add(name.lower())
            drawn[index] = replace(picture, file=f"{name}.png")
    return {title: drawn for title, drawn in sections.items() if drawn}


def best_groups(groups: Groups, score: str, limit: int) -> list[str]:
    """Labels of at most `limit` groups, in their order: the best by the mean of their final scores."""
    finals = groups.finals[(groups.finals["score"] == score) & np.isfinite(groups.finals["value"])]
    means = finals.groupby("group")["value"].mean().reindex(groups.labels)
    best = means.sort_values(ascending=not higher_is_better(score), kind="stable").index[:limit]
    return [label for label in groups.labels if label in best]


def curves(study: Study, groups: Groups, score: str) -> Iterator[Picture]:
    """A score, or the loss and N(k), against images seen; nothing where no run has two points of it."""
    points = study.curves.join(groups.runs[["group", "state"]], on="run")
    values = points[(points["score"] == score) & np.isfinite(points["value"])]
    if not values["run"].duplicated().any():
        return
    figure, axes = _figure(8.6, 4.0)
    chosen = best_groups(groups, score, MAX_COLOURED)
    colours = dict(zip(chosen, _wheel(len(chosen)), strict=True))
    for label, own in values.groupby("group", sort=False):
        _draw_group(axes, own, str(label), colours.get(str(label)))
    _style_curves(axes, values["value"], "loss" if score == "loss" else head(score))
    finished = values[values["state"] == "finished"]
    caption = "Lines: means over finished runs."
    if (finished.groupby("group")["run"].nunique() > 1).any():
        caption += " Bands: from the lowest to the highest of them."
    if len(finished) < len(values):
        caption += " Dashed: runs that are not finished."
    if len(groups.labels) > MAX_COLOURED:
        caption += f" Coloured: the best {MAX_COLOURED} of {len(groups.labels)}."
    levels = points[(points["score"] == "num_levels") & points["group"].isin(chosen)]
    if score == "loss" and len(levels):
        _draw_levels(axes.twinx(), levels, colours)
        caption += (
            " Dotted: N(k). The loss jumps where N does, and does not compare runs of other N, metric or weighting."
        )
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    yield Picture(f"curve_{score}", f"{score} against images seen", caption, png(figure))


def _draw_group(axes: Axes, values: pd.DataFrame, label: str, colour: Any) -> None:
    """Mean and range of the finished runs; the others dashed. Without a colour: grey, behind."""
    style: dict[str, Any] = {"color": colour, "zorder": 3, "label": short(label)}
    if colour is None:
        style = {"color": "0.75", "zorder": 1, "label": "_others"}
    runs = values.pivot(index="images_seen", columns="run", values="value")
    is_finished = values.groupby("run")["state"].first() == "finished"
    # Only where all have a value: a mean over fewer runs would jump where one ends.
    finished = _binned(runs.loc[:, is_finished].dropna())
    if finished.size:
        marker = "o" if len(finished) <= 15 else None
        axes.plot(finished.index, finished.mean(axis=1), marker=marker, markersize=3, linewidth=1.6, **style)
        low, high = finished.min(axis=1), finished.max(axis=1)
        axes.fill_between(finished.index, low, high, color=style["color"], alpha=0.15, linewidth=0)
        style["label"] = "_"
    for run in runs.columns[~is_finished]:
        curve = _binned(runs[[run]].dropna())
        axes.plot(curve.index, curve[run], "--", linewidth=1, marker="." if len(curve) == 1 else None, **style)
        style["label"] = "_"


def _draw_levels(axes: Axes, levels: pd.DataFrame, colours: dict[str, Any]) -> None:
    """N(k) on a second axis; one grey line where it is the same everywhere."""
    curves = levels.groupby(["group", "images_seen"])["value"].max().unstack("group").sort_index()
    is_same = bool((curves.nunique(axis=1) <= 1).all())
    for label, curve in curves.items():
        # As the loss: a row is of the steps since the one before it.
        places, counts = [0, *curve.dropna().index], [curve.dropna().iloc[0], *curve.dropna()]
        colour = "0.4" if is_same else colours[str(label)]
        axes.plot(places, counts, color=colour, linestyle=":", linewidth=1.2, drawstyle="steps-pre")
    axes.set_ylabel("N(k)")
    axes.spines[["top"]].set_visible(False)
    set_scale(axes, "y", levels["value"])


def choices(groups: Groups, scores: Sequence[str]) -> Iterator[Picture]:
    """The final scores by each axis of a grid; by name where there is no grid; of a search a cloud of dots an axis."""
    axes = groups.axes
    scores = [score for score in scores if (groups.finals["score"] == score).any()]
    if len(axes) < 2 or not scores:
        return
    keys = [] if groups.kind == "variant" else list(axes)
    series = {key: _names(axes.drop(columns=key)) for key in keys}
    is_grid = len(keys) > 0 and math.prod(axes.nunique()) == len(axes)
    if is_grid and all(names.nunique() <= _MAX_SERIES for names in series.values()):
        for key in keys:
            yield _draw_choice(groups, key, pd.DataFrame({"name": axes[key], "series": series[key]}), scores)
        return
    clouds = [key for key in keys if numbers_in(axes[key]) and axes[key].nunique() > 2]
    for key in clouds:
        yield _draw_choice(groups, key, pd.DataFrame({"name": axes[key], "series": ""}), scores, is_cloud=True)
    if len(axes) <= MAX_NAMED or not clouds:
        best = best_groups(groups, scores[0], MAX_NAMED)
        name = "settings" if groups.kind == "run" else groups.kind
        yield _draw_choice(groups, name, pd.DataFrame({"name": best, "series": ""}, best), scores)


def _names(axes: pd.DataFrame) -> pd.Series:
    """`metric=l2, lr=0.1`, one a group."""
    names = [", ".join(f"{key}={value}" for key, value in row.items()) for _, row in axes.iterrows()]
    return pd.Series(names, axes.index)


def _draw_choice(
    groups: Groups, name: str, choice: pd.DataFrame, scores: Sequence[str], *, is_cloud: bool = False
) -> Picture:
    """One panel a score. `choice`: label -> `name` or number on the axis, `series` that it belongs to."""
    numbers, names = numbers_in(choice["name"]), choice["series"].unique()
    is_line = numbers is not None and len(set(numbers)) > 1
    choice["place"] = numbers if is_line else pd.factorize(choice["name"])[0]
    if not is_line:  # series beside each other
        choice["place"] += 0.6 * ((pd.factorize(choice["series"])[0] + 0.5) / len(names) - 0.5)
    columns, rows = min(len(scores), 2), -(-len(scores) // 2)
    height = 3.2 if is_line else 1.1 + 0.3 * len(choice)
    figure, *panels = _figure(
        4.6 * columns + 1.2 * (len(names) > 1), height * rows, rows, columns, sharey=False if is_line else "row"
    )
    for axes, score in zip(panels, scores, strict=False):
        dots = groups.finals[groups.finals["score"] == score].join(choice, on="group", how="inner")
        _draw_dots(axes, dots, list(names), "y" if is_line else "x", with_means=not is_cloud)
        if is_line:
            set_scale(axes, "x", choice["place"])
            axes.set(xlabel=name, ylabel=head(score))
        else:
            values = choice["name"].unique()
            axes.set_yticks(range(len(values)), map(short, values), fontsize=8)
            axes.set(xlabel=head(score), ylim=(len(values) - 0.5, -0.5))
            _name_missing(axes, dots, choice["place"])
    for axes in panels[len(scores) :]:
        axes.set_visible(False)
    if len(names) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    caption = "Bars: mean and sample standard deviation at the end of training. Dots: finished runs."
    if is_cloud:
        caption = "Dots: finished runs at the end of training; other settings differ between them too."
    return Picture(f"choice_{name}", f"final scores by {name}", caption, png(figure))


def _draw_dots(axes: Axes, dots: pd.DataFrame, names: Sequence[str], score_axis: str, *, with_means: bool) -> None:
    """Every finished run as a dot, and the means with their spread; a series is a colour."""
    is_line = score_axis == "y"
    for name, colour in zip(names, _wheel(len(names)), strict=True):
        own = dots[(dots["series"] == name) & np.isfinite(dots["value"])]
        places = own[["place", "value"] if is_line else ["value", "place"]]
        axes.plot(*places.to_numpy(float).T, "o", color=colour, markersize=3.5, alpha=0.6, zorder=4)
        if with_means:
            means = own.groupby("place")["value"].agg(["mean", "std"]).fillna({"std": 0}).reset_index()
            ends = means[["place", "mean"] if is_line else ["mean", "place"]].to_numpy(float).T
            error = {f"{score_axis}err": means["std"]}
            line: dict[str, Any] = {"linestyle": "-"} if is_line else {"linestyle": "", "marker": "|", "markersize": 12}
            axes.errorbar(ends[0], ends[1], **error, **line, color=colour, capsize=3, label=short(name))
    set_scale(axes, score_axis, dots["value"])
    axes.grid(alpha=0.25, axis="both" if is_line else "x")


def _name_missing(axes: Axes, dots: pd.DataFrame, places: pd.Series) -> None:
    """In the row of a name: the runs that no dot shows."""
    for label, place in places.items():
        values = dots.loc[dots["group"] == label, "value"]
        lost = len(values) - len(finite(values))
        words = f"{lost} of {len(values)} diverged" if lost else "" if len(values) else "no finished run"
        axes.annotate(words, (0.98, place), xycoords=("axes fraction", "data"), va="center", ha="right", fontsize=7)


def samples(groups: Groups, scores: Sequence[str]) -> Iterator[Picture]:
    """The last grid of the first finished run of each group, a picture a sampler."""
    finished = groups.runs[groups.runs["state"] == "finished"]
    newest = [_newest_grids(path) for path in finished["path"]]
    for sampler in dict.fromkeys(name for files in newest for name in sorted(files)):
        score = next((score for score in scores if score.endswith(f"_{sampler}")), scores[0])
        chosen = best_groups(groups, score, MAX_COLOURED)
        grids: dict[str, np.ndarray] = {}
        for run, files in zip(finished.itertuples(), newest, strict=True):
            label = f"{run.group} (seed {run.seed})"
            is_new = run.group in chosen and not any(shown.startswith(f"{run.group} (seed ") for shown in grids)
            if is_new and sampler in files and (pixels := _read_grid(files[sampler], run.config)) is not None:
                grids[label] = pixels
        if grids:
            caption = f"{sampler}: samples of the first finished run of each group."
            caption += f" {len(grids)} of {len(groups.labels)} groups are shown." * (len(grids) < len(groups.labels))
            yield Picture(f"samples_{sampler}", f"samples, {sampler}", caption, _montage(grids))


def _newest_grids(path: Path) -> dict[str, Path]:
    """Sampler -> its last grid; files are named `onestep_000064000.png`."""
    files = [file for file in (path / "samples").glob("*_*.png") if file.stem.rpartition("_")[2].isdigit()]
    files.sort(key=lambda file: int(file.stem.rpartition("_")[2]))
    return {file.stem.rpartition("_")[0]: file for file in files}


def _read_grid(file: Path, config: dict[str, Any] | None) -> np.ndarray | None:
    """The first samples of a run, [H, W, 3]: as many as stay readable; None if they are damaged."""
    from PIL import Image

    try:
        with Image.open(file, formats=("PNG",)) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except Exception:  # of a damaged picture, or one that is a bomb: Pillow raises a dozen kinds
        return None
    count = (config or {}).get("callbacks.sample_grid.num_samples")
    columns = math.ceil(count**0.5) if isinstance(count, int) and count > 0 else 1
    cell = max((pixels.shape[1] - _FRAME) // columns, 1)
    width = max(_GRID_WIDTH // cell, 1) * cell
    return pixels[: _MAX_ROWS * cell + _FRAME, : width + _FRAME]


def _montage(grids: dict[str, np.ndarray]) -> bytes:
    """Grids beside each other as a PNG, each under its label."""
    columns = min(len(grids), 3)
    rows, width = -(-len(grids) // columns), 9.6 / max(columns, 2)
    height = max(pixels.shape[0] / pixels.shape[1] for pixels in grids.values()) * width + 0.3
    figure, *panels = _figure(width * columns, height * rows, rows, columns)
    for axes, (label, pixels) in zip(panels, grids.items(), strict=False):
        axes.imshow(pixels)
        axes.set_title(short(label), fontsize=9)
    for axes in panels:
        axes.set_axis_off()
    return png(figure)


def set_scale(axes: Axes, which: str, values: pd.Series) -> None:
    """Make an axis logarithmic where its values are positive and span a wide range."""
    from matplotlib.ticker import LogLocator, NullFormatter

    found = finite(values)
    if found.empty or found.min() <= 0 or found.max() <= _WIDE * found.min():
        return
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if found.max() < 300 * found.min() else (1.0,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _style_curves(axes: Axes, values: pd.Series, name: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set(xlabel="images seen", ylabel=name)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top"]].set_visible(False)
    set_scale(axes, "y", values)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, ...]:
    """A figure, and its panels row by row."""
    from matplotlib.figure import Figure  # without pyplot: no windows, no state to clean up

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, *figure.subplots(rows, columns, squeeze=False, **options).flat


def _wheel(count: int) -> list[Any]:
    """As many colours."""
    import matplotlib

    colours = matplotlib.colormaps["tab10" if count <= 10 else "tab20"]
    return [colours(index) for index in range(count)]


def png(figure: Figure) -> bytes:
    """A figure as a PNG of at most `MAX_BYTES`: with fewer colours, then with fewer pixels, if that takes it."""
    from PIL import Image

    for dpi, colours in ((110, None), (110, 256), (110, 64), (80, 64), (55, 64), (40, 32), (25, 32)):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": "consistency-report"})
        if colours is not None:
            picture = Image.open(buffer).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG", optimize=True)
        if buffer.tell() <= MAX_BYTES:
            break
    return buffer.getvalue()


def short(label: str, limit: int = 44) -> str:
    """A label that fits beside an axis, as plain text: `$` would start a formula."""
    label = label if len(label) <= limit else f"{label[: limit - 1]}…"
    return label.replace("$", r"\$")


def _binned(curves: pd.DataFrame) -> pd.DataFrame:
    """At most `_MAX_POINTS` rows: means of neighbours."""
    bins = np.arange(len(curves)) // max(-(-len(curves) // _MAX_POINTS), 1)
    return curves.reset_index().groupby(bins).mean().set_index("images_seen")
