"""What the pages say of figures is what the raw data say: tables between their marks, and sentences."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.evidence import kept, tables

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_raw_data(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == tables.filled(text, tables.all_tables()), "python -m benchmarks.evidence.tables writes them anew"


def test_every_table_stands_on_a_page() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    assert sorted(re.findall(r"<!-- table (\S+) -->", pages)) == sorted(tables.all_tables())


@pytest.mark.parametrize("page", kept.sentences())
def test_sentences_are_those_of_the_raw_data(page: str) -> None:
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    missing = [sentence for sentence in kept.sentences()[page] if sentence not in text]
    assert not missing
