"""A report as Markdown and as one HTML page, from the templates beside this file. All text of files is escaped."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2

from consistency.report.figures import Picture
from consistency.report.tables import Table

MARK = "<!-- Written by consistency-report: it writes all of this anew, but for what stands below the last line. -->"
NOTES = "<!-- What stands below this line is yours, and is kept. -->"


@dataclass(frozen=True)
class Report:
    """Everything that is on the page.

    `sections`: title -> figures; `common`: settings that are equal in all runs, one a line; `notes`: a person's.
    """

    title: str
    command: str
    remarks: Sequence[str]
    results: Table
    changes: Table | None
    sections: Mapping[str, Sequence[Picture]]
    runs: Table
    common: Sequence[str]
    notes: str = ""

    @property
    def pictures(self) -> list[Picture]:
        """All figures, in their order."""
        return [picture for section in self.sections.values() for picture in section]


def markdown(report: Report) -> str:
    """README.md, its pictures beside it; the notes stand at the end as they are."""
    return _render("README.md.jinja", report)


def page(report: Report) -> str:
    """report.html: nothing outside it is needed; without scripts it is read but not sorted."""
    return _render("report.html.jinja", report)


def notes_in(text: str) -> str | None:
    """What a person wrote below a report; None if the text is no report."""
    return text.rpartition(NOTES)[2].strip() if text.startswith(MARK) and NOTES in text else None


def _render(template: str, report: Report) -> str:
    loader = jinja2.PackageLoader("consistency.report")
    jinja = jinja2.Environment(
        loader=loader,
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    jinja.filters |= {"md": _md, "fenced": _fenced, "base64": lambda data: base64.b64encode(data).decode()}
    return jinja.get_template(template).render(report=report, MARK=MARK, NOTES=NOTES)


def _md(text: str) -> str:
    """Text that means itself in Markdown, also in a table."""
    text = html.escape(" ".join(text.split()), quote=False)
    text = re.sub(r"([\\`*|\[\]~])", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside a word it means itself


def _fenced(text: str) -> str:
    """Code in a fence that is longer than any in it."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 3)
    return f"{fence}\n{text}\n{fence}"
