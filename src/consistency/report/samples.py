"""Sample grids of several runs side by side, in one picture a sampler."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from consistency.report.figures import MAX_BYTES, Picture, featured, smaller
from consistency.report.groups import Group
from consistency.report.study import Run

_WIDTH = 1060  # of the picture, in pixels
_GAP, _LINE = 14, 20


class _Grid(NamedTuple):
    """A picture of samples, its label, and the side of a cell (its border included) in pixels."""

    image: Any
    label: str
    cell: int


def samplers_of(groups: Sequence[Group]) -> list[str]:
    """Names of the samplers that finished runs have grids of."""
    return list(dict.fromkeys(name for group in groups for run in group.finished for name in sorted(_newest(run))))


def draw_samples(groups: Sequence[Group], sampler: str, score: str, file: str) -> Picture | None:
    """The last grid of the first finished run of each group; None where there is none that can be read."""
    grids = [grid for group in featured(groups, score) if (grid := _grid_of(group, sampler)) is not None]
    if not grids:
        return None
    data, count = b"", 0
    for rows in (10, 5, 3, 2, 1):  # fewer samples rather than blurred ones
        parts = [_cropped(grid, rows) for grid in grids]
        data, count = _montage([part.image for part in parts], [part.label for part in parts]), parts[0].cell
        if len(data) <= MAX_BYTES:
            break
    caption = f"{sampler}: the first {count} samples of the first finished run of each row."
    if len(grids) < len(groups):
        caption += f" {len(grids)} of {len(groups)} are shown."
    return Picture(file, smaller(data), f"samples, {sampler}", caption)


def _newest(run: Run) -> dict[str, Path]:
    """Sampler -> its last grid; files are named `onestep_000064000.png`."""
    found: dict[str, tuple[int, Path]] = {}
    for path in (run.path / "samples").glob("*_*.png"):
        name, _, place = path.stem.rpartition("_")
        if place.isdigit():
            found[name] = max(found.get(name, (-1, path)), (int(place), path))
    return {name: path for name, (_, path) in found.items()}


def _grid_of(group: Group, sampler: str) -> _Grid | None:
    from PIL import Image

    for run in group.finished:
        path = _newest(run).get(sampler)
        if path is None:
            continue
        try:
            with Image.open(path, formats=("PNG",)) as opened:
                image = opened.convert("RGB")
        except Exception:  # of a damaged picture, or one that is a bomb: Pillow raises a dozen kinds
            continue
        count = (run.settings or {}).get("callbacks.sample_grid.num_samples")
        columns = math.ceil(count**0.5) if isinstance(count, int) and count > 0 else 1
        return _Grid(image, f"{group.label} (seed {run.seed})", max((image.width - 2) // columns, 1))
    return None


def _cropped(grid: _Grid, max_rows: int) -> _Grid:
    """The first rows, as many columns as fit on a page; `cell` of the result is the number of samples."""
    image, cell = grid.image, grid.cell
    rows, columns = max(image.height // cell, 1), max(image.width // cell, 1)
    rows, columns = min(rows, max_rows), min(columns, max(_WIDTH // 2 // cell, 1))
    image = image.crop((0, 0, min(columns * cell + 2, image.width), min(rows * cell + 2, image.height)))
    return _Grid(_readable(image), grid.label, rows * columns)


def _readable(image: Any) -> Any:
    """Small pictures larger by whole pixels, so that they stay crisp; those wider than a page smaller."""
    from PIL import Image

    factor = max(200 // image.width, 1)
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if image.width > _WIDTH:
        return image.resize((_WIDTH, image.height * _WIDTH // image.width), Image.Resampling.LANCZOS)
    return image


def _montage(images: Sequence[Any], labels: Sequence[str]) -> bytes:
    """Pictures in rows, each under its label, as a PNG; grey where all of them are."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 13)
    width, height = max(image.width for image in images), max(image.height for image in images)
    columns = min(len(images), max((_WIDTH + _GAP) // (width + _GAP), 1))
    rows = -(-len(images) // columns)
    size = (columns * (width + _GAP) + _GAP, rows * (height + _LINE + _GAP) + _GAP // 2)
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        row, column = divmod(index, columns)
        x, y = _GAP + column * (width + _GAP), row * (height + _LINE + _GAP) + 4
        while pen.textlength(label, font=font) > width + _GAP and len(label) > 4:
            label = f"{label[:-2].rstrip('…')}…"
        pen.text((x, y), label, fill="black", font=font)
        page.paste(image, (x, y + _LINE))
    red, green, blue = page.split()
    is_grey = red.tobytes() == green.tobytes() == blue.tobytes()
    buffer = io.BytesIO()
    (red if is_grey else page).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
