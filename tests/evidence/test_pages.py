"""What the pages say of figures is what the raw data say: tables between their marks, and sentences."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.evidence import tables
from benchmarks.evidence.sentences import missing, sentences


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_raw_data(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == tables.filled(text, tables.all_tables()), "python -m benchmarks.evidence.tables writes them anew"


def test_every_table_stands_on_a_page() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    assert sorted(re.findall(r"<!-- table (\S+) -->", pages)) == sorted(tables.all_tables())


@pytest.mark.parametrize("page", sentences())
def test_sentences_are_those_of_the_raw_data(page: str) -> None:
    must_say = missing(page)
    assert not must_say, "\n".join((f"{page} must say:", *must_say))
