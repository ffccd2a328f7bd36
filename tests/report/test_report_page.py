"""Markdown and HTML: nothing from a file is taken for markup."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from consistency.report.figures import Picture
from consistency.report.page import MARK, NOTES, Report, markdown, notes_in, page
from consistency.report.tables import Cell, Table

EVIL = "<script>alert(1)</script> {{ 1 + 1 }} | `x` [a](http://b) *c* _d_ a_b \"'&"
TABLE = Table(["name", "score ↓"], [[Cell(EVIL), Cell("1.5", 1.5)], [Cell("b"), Cell("-")]])
PICTURE = Picture("curve.png", EVIL, EVIL, b"\x89PNG")
REPORT = Report(EVIL, EVIL, [EVIL], TABLE, replace(TABLE, is_sortable=False), {EVIL: [PICTURE]}, TABLE, [EVIL], EVIL)


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def test_html_is_escaped_and_needs_nothing_outside_it():
    text = page(REPORT)
    found = Tags(text)
    assert found.tags.count("script") == 1
    assert "alert(1)" in text
    assert [source.partition(",")[0] for source in found.sources] == ["data:image/png;base64"]
    assert not {"a", "link", "iframe", "object"} & set(found.tags)
    assert "url(" not in text
    assert "@import" not in text


def test_numbers_carry_what_they_sort_by():
    text = page(REPORT)
    assert '<td class="number" data-order="1.5">1.5</td>' in text
    assert '<td class="number">-</td>' in text
    assert text.count('<table class="sortable">') == 2  # not that of changes


def test_markdown_is_escaped():
    text = markdown(replace(REPORT, notes=""))
    outside_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "<script>" not in outside_code
    assert "[a](http" not in outside_code
    assert r"\*c\*" in text
    assert "a_b" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    assert rows[1] == "| --- | ---: |"


def test_code_cannot_end_its_fence():
    assert re.search(r"\n(`{5,})\na\n````\n# b\n\1\n", markdown(replace(REPORT, command="a\n````\n# b")))


@pytest.mark.parametrize("notes", ["", "two sentences\n\n* and a list", "a\n\n![mine](x.png)"])
def test_notes_survive(notes):
    text = markdown(replace(REPORT, command=f"a {NOTES} b", notes=notes))
    assert notes_in(text) == notes


def test_other_files_have_no_notes():
    assert notes_in("# My notes\n") is None
    assert notes_in(f"{MARK}\n\nthe last line is gone") is None
