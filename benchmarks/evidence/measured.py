"""Rows of the tables that benchmarks have left in benchmarks/results/*.json."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
NETS = {
    "MNIST MLP": "MLP 784-256-256-10, batch 128",
    "small GPT": "small GPT, batch 32",
    "small ViT": "small ViT, batch 16",
    "Basic+BN": "CIFAR net with batch norm, batch 128",
    "ResNet-18": "ResNet-18, batch 32",
    "geometric mean": "geometric mean",
}
ADAMW, OURS, FORWARD, KRONECKER = (
    "AdamW, fused",
    "CurveBall",
    'CurveBall, curvature="forward"',
    'CurveBall, "kronecker"',
)

Row = dict[str, Any]
Rows = list[Row]


@functools.cache
def tables_of(file: str) -> dict[str, dict[str, Any]]:
    """Return all tables of a file by title: their rows, and what was noted of them."""
    text = (RESULTS / f"{file}.json").read_text(encoding="utf-8")
    return {found["title"]: found for found in json.loads(text)["tables"]}


def rows_of(file: str, title: str) -> Rows | None:
    """Return the rows of a table, or None if there is none of this title."""
    found = tables_of(file).get(title)
    return found["rows"] if found else None


def row_of(file: str, title: str, name: str) -> Row | None:
    """Return the row of this name, or None if there is none."""
    return next((row for row in rows_of(file, title) or [] if row[""] == name), None)


def there(file: str, title: str, name: str) -> Row:
    """Return the row of this name, which must be there."""
    row = row_of(file, title, name)
    if row is None:
        raise KeyError(f"{file}.json has no row {name!r} of {title!r}")
    return row


def titles(file: str, begin: str) -> list[str]:
    """Return the titles that begin so."""
    return [title for title in tables_of(file) if title.startswith(begin)]


def net_without_batch(net: str) -> str:
    """Return what tables say of a net, without its batch size."""
    return NETS[net].rpartition(", batch")[0] or NETS[net]


def median(text: str) -> float:
    """Return the median of a cell like `1.14 (1.13-1.15)`."""
    return float(text.split()[0])


def span(values: Iterable[float], digits: str, between: str = " to ") -> str:
    """Return the range of values, one number where both ends are written alike."""
    known = sorted(values)
    return between.join(dict.fromkeys(f"{end:{digits}}" for end in (known[0], known[-1])))


def note_of(file: str, title: str) -> str:
    """Return what was noted of a table."""
    return str(tables_of(file)[title]["note"])
