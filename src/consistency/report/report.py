"""`consistency-report`: what the runs of a study say together, as Markdown with pictures and as one HTML page."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from consistency.report.choices import choices_of, draw_choice
from consistency.report.figures import Picture, draw_loss, draw_quality
from consistency.report.groups import Group, make_groups, short_names
from consistency.report.pages import NOTES, Block, Code, Heading, Remarks, Text, markdown, notes_in, page
from consistency.report.samples import draw_samples, samplers_of
from consistency.report.settings import shown
from consistency.report.study import Study, read_study
from consistency.report.tables import (
    changes_table,
    common_settings,
    remarks,
    results_table,
    runs_table,
)

_ABOUT = """Compare the runs of a study: tables with mean and spread over seeds, curves against images seen,
final scores by what was varied, sample grids side by side. Reads the run directories only; no account and no
GPU are needed. Runs that failed, were stopped or never started are shown as such."""
_EXAMPLES = """examples:
  consistency-report outputs/ladder_digits_ict
  consistency-report outputs/study --score fd_classifier_onestep --out experiments/results/metric"""

_HOW_TO_READ = (
    "Scores at the end of training: mean ± sample standard deviation over n finished runs; ↓ lower is better, "
    "↑ higher is better. Wall time is the mean training time of a run."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the result is its exit code, 2 if what was asked for is not there."""
    parser = argparse.ArgumentParser(
        prog="consistency-report",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study_dir", type=Path, metavar="STUDY_DIR", help="a study, any folder of runs, or one run")
    where = "where README.md, its PNGs and report.html go (default: STUDY_DIR/report)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=where)
    which = "only this score: fd_classifier_onestep, or fd_classifier for all samplers (default: all scores)"
    parser.add_argument("--score", metavar="NAME", help=which)
    asked = parser.parse_args(arguments)
    try:
        study = read_study(asked.study_dir)
        scores = _chosen(study, asked.score)
        out = asked.out or asked.study_dir / "report"
    except (ValueError, OSError) as error:
        return _refuse(error)
    groups = make_groups(study.runs)
    blocks = report(study, groups, scores)
    try:
        _write(out, study.name, blocks)
    except (ValueError, OSError) as error:
        return _refuse(error)
    _show(study, groups, scores, out)
    return 0


def _refuse(error: Exception) -> int:
    """One line, and the exit code."""
    print(f"consistency-report: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def report(study: Study, groups: Sequence[Group], scores: Sequence[str]) -> list[Block]:
    """Everything that is on the page, in its order."""
    said = remarks(study, groups, scores)
    blocks: list[Block] = []
    if study.command:
        blocks.append(Code(study.command))
    if said:
        blocks.append(Remarks(said))
    blocks += [Heading("Results"), Text(_HOW_TO_READ), results_table(groups, scores)]
    if (changed := changes_table(groups)) is not None:
        blocks += [Heading("What was changed"), changed]
    blocks += _pictures(groups, scores)
    blocks += [Heading("Runs"), runs_table(groups, scores)]
    if common := common_settings(groups):
        lines = "\n".join(f"{key}: {shown(value)}" for key, value in common)
        blocks.append(Code(lines, summary=f"{len(common)} settings that are equal in all runs"))
    return blocks


def _pictures(groups: Sequence[Group], scores: Sequence[str]) -> list[Block]:
    """Sections of figures; those of which there is nothing to draw are left out."""
    choices = [draw_choice(choice, scores, _file("choice", choice.name)) for choice in choices_of(groups, scores[0])]
    curves = [draw_quality(groups, score, _file("curve", score)) for score in scores if score != "loss"]
    samples = [
        draw_samples(groups, sampler, _score_of(sampler, scores), _file("samples", sampler))
        for sampler in samplers_of(groups)
    ]
    sections: dict[str, Sequence[Picture | None]] = {
        "Final scores by what was varied": choices,
        "Scores while training": curves,
        "Samples": samples,
        "Loss": [draw_loss(groups, "curve_loss.png")],
    }
    blocks: list[Block] = []
    taken: set[str] = set()
    for title, pictures in sections.items():
        drawn = [_named_apart(picture, taken) for picture in pictures if picture is not None]
        blocks += [Heading(title), *drawn] if drawn else []
    return blocks


def _named_apart(picture: Picture, taken: set[str]) -> Picture:
    """The picture under a file name of its own: `a/b` and `a_b` would share one."""
    stem, name = picture.file.removesuffix(".png"), picture.file
    while name.lower() in taken:
        name = f"{stem}-{len(taken)}.png"
    taken.add(name.lower())
    return replace(picture, file=name)


def _chosen(study: Study, name: str | None) -> list[str]:
    """All scores, or those of one name, with or without that of the sampler."""
    known = study.scores
    chosen = known if name is None else [score for score in known if score == name or score.startswith(f"{name}_")]
    if not chosen and name == "loss":
        chosen = ["loss"]
    if not chosen:
        raise ValueError(f"--score is {name}; these runs have: {', '.join(known)}")
    return chosen


def _score_of(sampler: str, scores: Sequence[str]) -> str:
    return next((score for score in scores if score.endswith(f"_{sampler}")), scores[0])


def _file(kind: str, name: str) -> str:
    """A file name of something that came out of a file."""
    return f"{kind}_{re.sub(r'[^A-Za-z0-9.-]+', '_', name).strip('._') or 'unnamed'}.png"


def _write(out: Path, title: str, blocks: Sequence[Block]) -> None:
    """The pages and their pictures, each in one rename; pictures of an earlier report that are in no page now go.

    Raises:
        ValueError: if a file of these names is of no report.
    """
    readme = out / "README.md"
    before = readme.read_text(encoding="utf-8") if readme.exists() else ""
    notes = notes_in(before)
    # README.md first: what says that the folder is a report's is there before anything else.
    files = {
        readme.name: markdown(title, blocks, notes or "").encode(),
        "report.html": page(title, blocks, notes or "").encode(),
        **{block.file: block.data for block in blocks if isinstance(block, Picture)},
    }
    foreign = [name for name in files if notes is None and (out / name).exists()]
    if foreign:
        raise ValueError(f"{out / foreign[0]} was not written by consistency-report; name another folder with --out")
    written = before.rpartition(NOTES)[0]  # pictures in the notes are a person's
    earlier = re.findall(r"^!\[.*\]\(([\w.-]+\.png)\)$", written, re.MULTILINE)
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        partial = out / f".{name}.partial"
        partial.write_bytes(data)
        os.replace(partial, out / name)
    for name in set(earlier) - set(files):
        (out / name).unlink(missing_ok=True)


def _show(study: Study, groups: Sequence[Group], scores: Sequence[str], out: Path) -> None:
    """The results on the screen, and where the rest is."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Shown

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file has no width
    table, axes = results_table(groups, scores), list(groups[0].axes)
    brief = dict(zip(axes, short_names(axes), strict=True))
    needless = {"images seen"} | ({"runs"} if all(run.is_finished for run in study.runs) else set())
    columns = [index for index, name in enumerate(table.heads) if name not in needless]
    grid = Shown(title=escape(study.name), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index in columns:
        is_number = all(row[index].is_number for row in table.rows)
        # fd_classifier_onestep in two lines: more scores fit beside each other.
        name = brief.get(table.heads[index], table.heads[index])
        first, _, last = name.rpartition("_")
        name = f"{first}\n{last}" if first and last.endswith(("↓", "↑")) else name
        side, least = ("right" if is_number else "left"), (12 if name in ("variant", "runs") else 6)
        grid.add_column(escape(name), justify=side, overflow="fold", min_width=least)  # type: ignore[arg-type]
    for row in table.rows:
        grid.add_row(*(escape(row[index].text) for index in columns))
    console.print(grid)
    for line in remarks(study, groups, scores):
        console.print(f"! {line}", markup=False, highlight=False, soft_wrap=True)
    for name in ("README.md", "report.html"):
        console.print(f"{out / name}", markup=False, highlight=False, soft_wrap=True)
