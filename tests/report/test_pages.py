"""Markdown and HTML: nothing from a file is taken for markup."""

import re
from html.parser import HTMLParser

import pytest

from consistency.report.figures import Picture
from consistency.report.pages import MARK, NOTES, Code, Heading, Remarks, Text, markdown, notes_in, page
from consistency.report.tables import Cell, Table

EVIL = "<script>alert(1)</script> | `x` [a](http://b) *c* _d_ a_b \"'&"
TABLE = Table(["name", "score ↓"], [[Cell(EVIL), Cell("1.5", 1.5, True)], [Cell("b"), Cell("-", None, True)]])
PICTURE = Picture("curve.png", b"\x89PNG", EVIL, "caption")


def all_blocks():
    return [Heading(EVIL), Text(EVIL), Remarks([EVIL]), Code(EVIL), Code(EVIL, summary=EVIL), TABLE, PICTURE]


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def test_html_is_escaped_and_needs_nothing_outside_it():
    text = page(EVIL, all_blocks(), EVIL)
    found = Tags(text)
    assert found.tags.count("script") == 1
    assert "alert(1)" in text
    assert len(found.sources) == 1
    assert found.sources[0].startswith("data:image/png;base64,")
    assert not {"a", "link", "iframe", "object"} & set(found.tags)
    assert "url(" not in text
    assert "@import" not in text


def test_numbers_carry_what_they_sort_by():
    text = page("x", [TABLE])
    assert '<td class="number" data-order="1.5">1.5</td>' in text
    assert '<td class="number">-</td>' in text
    assert '<table class="sortable">' in text
    assert "sortable" not in page("x", [Table(["a"], [], is_sortable=False)]).split("<body>")[1].split("<script>")[0]


def test_text_of_files_cannot_become_part_of_the_page():
    assert "@SCRIPT@" in page("@SCRIPT@", [Text("@BODY@ @SCRIPT@")])


def test_markdown_is_escaped():
    text = markdown(EVIL, all_blocks())
    outside_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "<script>" not in outside_code
    assert "[a](http" not in outside_code
    assert r"\*c\*" in text
    assert "a_b" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [3, 3, 3, 3]
    assert rows[1] == "| --- | ---: |"


def test_code_cannot_end_its_fence():
    text = markdown("x", [Code("a\n````\n# b")])
    assert re.search(r"\n(`{5,})\na\n````\n# b\n\1\n", text)


@pytest.mark.parametrize("notes", ["", "two sentences\n\n* and a list", "a\n\n![mine](x.png)"])
def test_notes_survive(notes):
    text = markdown("x", [Text("y"), Code(f"a {NOTES} b")], notes)
    assert notes_in(text) == notes
    assert notes_in(markdown("x", [], notes_in(text))) == notes


def test_other_files_have_no_notes():
    assert notes_in("# My notes\n") is None
    assert notes_in(f"{MARK}\n\nthe last line is gone") is None
