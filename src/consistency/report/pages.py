"""A report as Markdown and as one HTML page. All text comes from files, and is escaped."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from consistency.report.figures import Picture
from consistency.report.tables import Cell, Table

MARK = "<!-- Written by consistency-report: it writes all of this anew, but for what stands below the last line. -->"
NOTES = "<!-- What stands below this line is yours, and is kept. -->"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Remarks:
    """What a reader must see."""

    lines: list[str]


@dataclass(frozen=True)
class Code:
    """A command, or what a program said; `summary`: behind this line until it is opened."""

    text: str
    summary: str = ""


@dataclass(frozen=True)
class Heading:
    """A section begins."""

    text: str


Block = Text | Remarks | Code | Heading | Table | Picture


def markdown(title: str, blocks: Sequence[Block], notes: str = "") -> str:
    """`README.md`, its pictures beside it; `notes` are a person's, and stand at the end as they are."""
    parts = [MARK, f"# {_md(title)}", *map(_markdown_block, blocks), NOTES]
    return "\n\n".join(parts) + "\n" + (f"\n{notes.strip()}\n" if notes.strip() else "")


def notes_in(text: str) -> str | None:
    """What a person wrote below a report; None if the text is no report."""
    return text.rpartition(NOTES)[2].strip() if text.startswith(MARK) and NOTES in text else None


def page(title: str, blocks: Sequence[Block], notes: str = "") -> str:
    """`report.html`: nothing outside it is needed; without scripts it is read but not sorted."""
    parts = [f"<h1>{html.escape(title)}</h1>", *map(_html_block, blocks)]
    if notes:
        parts.append(f'<h2>Notes</h2>\n<div class="notes">{html.escape(notes)}</div>')
    body = "\n".join(parts)
    return (
        _PAGE.replace("@TITLE@", html.escape(title))
        .replace("@STYLE@", _STYLE)
        .replace("@SCRIPT@", _SCRIPT)
        .replace("@BODY@", body)
    )


def _markdown_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"## {_md(block.text)}"
    if isinstance(block, Text):
        return _md(block.text)
    if isinstance(block, Remarks):
        return "\n".join(f"> * {_md(line)}" for line in block.lines)
    if isinstance(block, Code):
        fence = "`" * (max(map(len, re.findall("`+", block.text)), default=0) + 3)
        code = f"{fence}\n{block.text}\n{fence}"
        return f"<details><summary>{_md(block.summary)}</summary>\n\n{code}\n\n</details>" if block.summary else code
    if isinstance(block, Picture):
        return f"![{_md(block.alt)}]({block.file})\n\n*{_md(block.caption)}*"
    rule = ["---:" if right else "---" for right in _are_numbers(block)]
    rows = [[_md(cell.text) for cell in row] for row in block.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in ([_md(name) for name in block.heads], rule, *rows))


def _are_numbers(table: Table) -> list[bool]:
    """Which columns stand to the right."""
    return [all(row[index].is_number for row in table.rows) for index in range(len(table.heads))]


def _md(text: str) -> str:
    """Text that means itself in Markdown, also in a table."""
    text = html.escape(" ".join(text.split()), quote=False)
    text = re.sub(r"([\\`*|\[\]~])", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside a word it means itself


def _html_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{html.escape(block.text)}</h2>"
    if isinstance(block, Text):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Remarks):
        return '<ul class="remarks">' + "".join(f"<li>{html.escape(line)}</li>" for line in block.lines) + "</ul>"
    if isinstance(block, Code):
        code = f"<pre>{html.escape(block.text)}</pre>"
        return f"<details><summary>{html.escape(block.summary)}</summary>{code}</details>" if block.summary else code
    if isinstance(block, Picture):
        source = f"data:image/png;base64,{base64.b64encode(block.data).decode()}"
        caption = f"<figcaption>{html.escape(block.caption)}</figcaption>"
        return f'<figure><img alt="{html.escape(block.alt)}" src="{source}">{caption}</figure>'
    kinds = [' class="number"' if right else "" for right in _are_numbers(block)]
    heads = "".join(f"<th{kind}>{html.escape(name)}</th>" for name, kind in zip(block.heads, kinds, strict=True))
    rows = "\n".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in block.rows)
    kind = ' class="sortable"' if block.is_sortable else ""
    return f'<div class="wide"><table{kind}><thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _html_cell(cell: Cell) -> str:
    order = "" if cell.order is None else f' data-order="{cell.order!r}"'
    kind = ' class="number"' if cell.is_number else ""
    return f"<td{kind}{order}>{html.escape(cell.text)}</td>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="consistency-report">
<title>@TITLE@</title>
<style>@STYLE@</style>
</head>
<body>
@BODY@
<script>@SCRIPT@</script>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; --warn: #c80; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { white-space: nowrap; background: var(--soft); }
td { overflow-wrap: break-word; max-width: 30rem; }
.number { text-align: right; } td.number { white-space: nowrap; }
tbody tr:hover { background: var(--soft); }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid; }
th[aria-sort="ascending"] button::after { content: " \\25B4"; }
th[aria-sort="descending"] button::after { content: " \\25BE"; }
figure { margin: 1rem 0; } img { max-width: 100%; background: #fff; border-radius: 4px; }
figcaption { font-size: .85rem; opacity: .8; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { padding: .6rem .8rem; background: var(--soft); font-size: .82rem; border-radius: 4px; }
.remarks { border-left: 4px solid var(--warn); background: var(--soft); padding: .5rem .5rem .5rem 2rem; }
.notes { white-space: pre-wrap; }
summary { cursor: pointer; }
"""

# A column of numbers sorts by data-order, any other one by its text; cells without a value stay last both ways.
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    button.title = "Sort by this column";
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => ({ row, cell: row.cells[column] }));
      const isNumber = rows.some(({ cell }) => cell.dataset.order !== undefined);
      const value = ({ cell }) => {
        const order = cell.dataset.order;
        if (isNumber) return order === undefined ? null : Number(order.replace("inf", "Infinity"));
        return ["", "-"].includes(cell.textContent) ? null : cell.textContent;
      };
      rows.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        if (x === y) return 0;
        return sign * (isNumber ? (x < y ? -1 : 1) : x.localeCompare(y, undefined, { numeric: true }));
      });
      body.append(...rows.map(({ row }) => row));
    });
  });
}
"""
