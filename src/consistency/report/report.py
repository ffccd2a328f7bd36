"""`consistency-report`: what the runs of a study say together, as Markdown with pictures and as one HTML page."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from consistency.io.atomic import atomic_write
from consistency.report.figures import pictures
from consistency.report.group import Groups, make_groups, readable, short_names
from consistency.report.load import Study, read_study
from consistency.report.page import NOTES, Report, markdown, notes_in, page
from consistency.report.tables import changes_table, remarks, results_table, runs_table

_ABOUT = """Compare the runs of a study: tables with mean and spread over seeds, curves against images seen,
final scores by what was varied, sample grids side by side. Reads the run directories only; no account and no
GPU are needed. Runs that failed, were stopped or never started are shown as such."""
_EXAMPLES = """examples:
  consistency-report outputs/ladder_digits_ict
  consistency-report outputs/study --score fd_classifier_onestep --out experiments/results/metric"""


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
    report = make_report(study, make_groups(study), scores)
    try:
        _write(out, report)
    except (ValueError, OSError) as error:
        return _refuse(error)
    _show(report, out)
    return 0


def _refuse(error: Exception) -> int:
    """One line, and the exit code."""
    print(f"consistency-report: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def make_report(study: Study, groups: Groups, scores: Sequence[str]) -> Report:
    """Everything that is on the page."""
    settings = groups.settings
    common = readable(settings.loc[:, settings.notna().all() & (settings.nunique() == 1)])
    return Report(
        title=study.name,
        command=study.command,
        remarks=remarks(study, groups, scores),
        results=results_table(groups, scores),
        changes=changes_table(groups),
        sections=pictures(study, groups, scores),
        runs=runs_table(study, groups, scores),
        common=[f"{key}: {values.iloc[0]}" for key, values in common.items()],
    )


def _chosen(study: Study, name: str | None) -> list[str]:
    """All scores, or those of one name, with or without that of the sampler."""
    known = study.scores
    chosen = known if name is None else [score for score in known if score == name or score.startswith(f"{name}_")]
    if not chosen and name == "loss":
        chosen = ["loss"]
    if not chosen:
        raise ValueError(f"--score is {name}; these runs have: {', '.join(known)}")
    return chosen


def _write(out: Path, report: Report) -> None:
    """The pages and their pictures, each in one rename; pictures of an earlier report that are in no page now go.

    Raises:
        ValueError: if a file of these names is of no report.
    """
    readme = out / "README.md"
    before = readme.read_text(encoding="utf-8") if readme.exists() else ""
    notes = notes_in(before)
    report = replace(report, notes=notes or "")
    # README.md first: what says that the folder is a report's is there before anything else.
    files = {readme.name: markdown(report).encode(), "report.html": page(report).encode()}
    files |= {picture.file: picture.data for picture in report.pictures}
    foreign = [name for name in files if notes is None and (out / name).exists()]
    if foreign:
        raise ValueError(f"{out / foreign[0]} was not written by consistency-report; name another folder with --out")
    written = before.rpartition(NOTES)[0]  # pictures in the notes are a person's
    earlier = re.findall(r"^!\[.*\]\(([\w.-]+\.png)\)$", written, re.MULTILINE)
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        with atomic_write(out / name) as partial:
            partial.write_bytes(data)
    for name in set(earlier) - set(files):
        (out / name).unlink(missing_ok=True)


def _show(report: Report, out: Path) -> None:
    """The results on the screen, and where the rest is."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file has no width
    table = report.results
    grid = Table(title=escape(report.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    shown = [index for index, name in enumerate(table.heads) if name != "images seen"]
    for index in shown:
        # fd_classifier_onestep in two lines: more scores fit beside each other.
        name = short_names(table.heads)[index]
        name = "\n".join(name.rsplit("_", 1)) if name.endswith(("↓", "↑")) else name
        grid.add_column(escape(name), justify="right" if table.are_numbers[index] else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*(escape(row[index].text) for index in shown))
    console.print(grid)
    for line in report.remarks:
        console.print(f"! {line}", markup=False, highlight=False, soft_wrap=True)
    for name in ("README.md", "report.html"):
        console.print(f"{out / name}", markup=False, highlight=False, soft_wrap=True)
