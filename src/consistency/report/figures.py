"""Curves against images seen, and what all figures share: pictures as bytes, colours, axes."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from consistency.report.groups import Group
from consistency.report.logs import Curve
from consistency.report.settings import numeric
from consistency.report.tables import finals, head, higher_is_better

MAX_BYTES = 95_000  # a picture: reports are committed
MAX_FEATURED = 12  # groups with a colour of their own
_MAX_POINTS = 200
_WIDE = 20.0  # a range of more than this factor gets a logarithmic axis


@dataclass(frozen=True)
class Picture:
    """A PNG beside the report, its caption, and what it shows in a word."""

    file: str
    data: bytes
    alt: str
    caption: str


def draw_quality(groups: Sequence[Group], score: str, file: str) -> Picture | None:
    """A score against images seen; None where no run has two points of it."""
    if all(len(_finite(run.curve(score))) < 2 for group in groups for run in group.runs):
        return None
    figure, axes = _figure()
    colours = colours_of(groups, score)
    for group in groups:
        _draw_group(axes, group, score, colours.get(group.label))
    set_scale(axes, "y", (value for line in axes.lines for value in line.get_ydata()))
    _label_images(axes, head(score))
    _legend(figure, axes)
    return Picture(file, png(figure), f"{score} against images seen", _caption(groups))


def draw_loss(groups: Sequence[Group], file: str) -> Picture | None:
    """The loss against images seen, and N(k) on the same axis; None where no run has two points."""
    if all(len(_finite(run.loss)) < 2 for group in groups for run in group.runs):
        return None
    figure, axes = _figure()
    colours = colours_of(groups, "loss")
    for group in groups:
        _draw_group(axes, group, "loss", colours.get(group.label))
    set_scale(axes, "y", (value for line in axes.lines for value in line.get_ydata()))
    _label_images(axes, "loss")
    caption = _caption(groups)
    if _draw_levels(axes, groups, colours):
        caption += (
            " Dotted: N(k). The loss jumps where N does, and does not compare runs of other N, metric or weighting."
        )
    _legend(figure, axes)
    return Picture(file, png(figure), "loss and N(k) against images seen", caption)


def colours_of(groups: Sequence[Group], score: str) -> dict[str, Any]:
    """Label -> colour, of the best where there are too many; a scale where what was varied is a number."""
    import matplotlib

    chosen = featured(groups, score)
    values = [value for group in chosen for value in group.axes.values()] if len(groups[0].axes) == 1 else []
    if values and (places := numeric(values)) is not None and len(chosen) > 2:
        order = sorted(range(len(chosen)), key=lambda index: places[index])
        shades = matplotlib.colormaps["viridis"]
        return {chosen[index].label: shades(0.9 * rank / (len(chosen) - 1)) for rank, index in enumerate(order)}
    wheel = matplotlib.colormaps["tab10" if len(chosen) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    return {group.label: wheel[index % len(wheel)] for index, group in enumerate(chosen)}


def featured(groups: Sequence[Group], score: str, limit: int = MAX_FEATURED) -> list[Group]:
    """At most `limit` groups, in their order: the best by the mean of their final scores."""
    if len(groups) <= limit:
        return list(groups)
    sign = -1 if higher_is_better(score) else 1

    def rank(group: Group) -> float:
        values = [value for value in finals(group, score) if math.isfinite(value)]
        return sign * mean(values) if values else math.inf

    best = sorted(groups, key=rank)[:limit]
    return [group for group in groups if group in best]


def set_scale(axes: Any, which: str, values: Iterable[float]) -> None:
    """Make an axis logarithmic where its values are positive and span a wide range."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    found = [float(value) for value in values if math.isfinite(value)]
    if not found or min(found) <= 0 or max(found) <= _WIDE * min(found):
        return
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if max(found) < 300 * min(found) else (1.0,)))
    thousands = EngFormatter(sep="")
    axis.set_major_formatter(
        FuncFormatter(lambda value, position: thousands(value) if value >= 1000 else f"{value:.10g}")
    )
    axis.set_minor_formatter(NullFormatter())


def png(figure: Any) -> bytes:
    """A matplotlib figure as a PNG of at most `MAX_BYTES`, with fewer colours if that takes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": "consistency-report"})
    return smaller(buffer.getvalue())


def smaller(data: bytes) -> bytes:
    """A PNG of at most `MAX_BYTES`: fewer colours, then fewer pixels."""
    from PIL import Image

    picture = Image.open(io.BytesIO(data)).convert("RGB")
    for colours in (256, 64, 32):
        if len(data) <= MAX_BYTES:
            return data
        data = _saved(picture.quantize(colours, dither=Image.Dither.NONE))
    while len(data) > MAX_BYTES:
        picture = picture.resize((picture.width * 4 // 5, picture.height * 4 // 5), Image.Resampling.LANCZOS)
        data = _saved(picture.quantize(64, dither=Image.Dither.NONE))
    return data


def short(label: str, limit: int = 44) -> str:
    """A label that fits beside an axis, as plain text: `$` would start a formula."""
    label = label if len(label) <= limit else f"{label[: limit - 1]}…"
    return label.replace("$", r"\$")


def _saved(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no windows, no state to clean up

    figure = Figure(figsize=(8.6, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top"]].set_visible(False)
    return figure, axes


def _draw_group(axes: Any, group: Group, score: str, colour: Any) -> None:
    """Mean and range of the finished runs; the others dashed. Without a colour: grey, behind."""
    colour, order, label = (colour, 3, short(group.label)) if colour is not None else ("0.75", 1, "_others")
    finished = [_finite(run.curve(score)) for run in group.finished]
    places = _common_places(finished)
    if places:
        values = [[curve[place] for curve in finished] for place in places]
        x, middle = _binned(places, [mean(entry) for entry in values])
        marker = "o" if len(x) <= 15 else None
        axes.plot(x, middle, color=colour, label=label, zorder=order, marker=marker, markersize=3, linewidth=1.6)
        if len(finished) > 1:
            _, low = _binned(places, [min(entry) for entry in values])
            _, high = _binned(places, [max(entry) for entry in values])
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0, zorder=order - 1)
    unfinished = [curve for run in group.runs if not run.is_finished and (curve := _finite(run.curve(score)))]
    for index, curve in enumerate(unfinished):
        x, y = _binned(sorted(curve), [curve[place] for place in sorted(curve)])
        own = label if index == 0 and not places else "_"
        axes.plot(
            x,
            y,
            color=colour,
            label=own,
            zorder=order,
            linestyle="--",
            linewidth=1,
            marker="." if len(x) == 1 else None,
        )


def _draw_levels(axes: Any, groups: Sequence[Group], colours: dict[str, Any]) -> bool:
    """N(k) on a second axis, one line where it is the same everywhere; whether there is any."""
    longest = {group.label: max((run.levels for run in group.runs), key=len, default={}) for group in groups}
    shapes: dict[tuple[tuple[int, float], ...], str] = {}
    for label, levels in longest.items():
        if levels and label in colours:
            shapes.setdefault(tuple(sorted(levels.items())), label)
    if not shapes:
        return False
    twin = axes.twinx()
    twin.spines[["top"]].set_visible(False)
    for points, label in shapes.items():
        # As the loss: a row is of the steps since the one before it.
        places, counts = zip(*[(0, points[0][1]), *points], strict=True)
        colour = "0.4" if len(shapes) == 1 else colours[label]
        twin.plot(places, counts, color=colour, linestyle=":", linewidth=1.2, drawstyle="steps-pre")
    twin.set_ylabel("N(k)")
    set_scale(twin, "y", (count for points in shapes for _, count in points))
    return True


def _label_images(axes: Any, what: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set(xlabel="images seen", ylabel=what)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)


def _caption(groups: Sequence[Group]) -> str:
    several = any(len(group.finished) > 1 for group in groups)
    text = "Lines: means over finished runs." + (" Bands: from the lowest to the highest of them." if several else "")
    if any(not run.is_finished and (run.loss or run.curves) for group in groups for run in group.runs):
        text += " Dashed: runs that are not finished."
    if len(groups) > MAX_FEATURED:
        text += f" Coloured: the best {MAX_FEATURED} of {len(groups)}."
    return text


def _finite(curve: Curve) -> Curve:
    return {place: value for place, value in curve.items() if math.isfinite(value)}


def _common_places(curves: Sequence[Curve]) -> list[int]:
    """Where all of them have a value: a mean over fewer runs would jump where one ends."""
    return sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []


def _binned(places: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `_MAX_POINTS` points: means of neighbours."""
    size = -(-len(places) // _MAX_POINTS)
    starts = range(0, len(places), max(size, 1))
    return [mean(places[i : i + size]) for i in starts], [mean(values[i : i + size]) for i in starts]
