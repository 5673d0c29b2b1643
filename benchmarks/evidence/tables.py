"""Write the tables of the documentation anew from the raw data: `python -m benchmarks.evidence.tables`.

Sentences are rewritten by hand: it prints those that have other figures now.

A table stands between two comments, `<!-- table NAME -->` and `<!-- end of table -->`. Each part has a function
`tables` that returns its tables by name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.evidence import (
    accuracy_tables,
    demo,
    flat_losses,
    gpu_tables,
    kept,
    network_tables,
    outliers,
    published,
    robustness_tables,
    sentences,
    throughput_tables,
)
from benchmarks.evidence.contest import tables as contest_tables

_ROOT = Path(__file__).resolve().parents[2]
PAGES = [_ROOT / "README.md", *sorted((_ROOT / "docs").rglob("*.md"))]
PARTS: tuple[Callable[[], dict[str, str]], ...] = (
    demo.tables,
    kept.tables,
    gpu_tables.tables,
    published.tables,
    robustness_tables.tables,
    accuracy_tables.tables,
    throughput_tables.tables,
    contest_tables.tables,
    network_tables.tables,
    outliers.tables,
    flat_losses.tables,
)

_PLACE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def filled(page: str, tables: dict[str, str]) -> str:
    """Return the text of a page with these tables in their places; every place needs its table."""
    return _PLACE.sub(lambda place: f"{place[1]}\n{tables[place[2]]}\n{place[3]}", page)


@functools.cache
def all_tables() -> dict[str, str]:
    """Return the tables of all parts by name."""
    return {name: table for part in PARTS for name, table in part().items()}


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), all_tables()), encoding="utf-8")
    for name in sentences.sentences():
        for sentence in sentences.missing(name):
            print(f"{name} must say: {sentence}")
