"""Tables of the documentation from what test_throughput.py, test_memory.py and test_scaling.py have measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from benchmarks.evidence.markdown import table
from benchmarks.evidence.measured import NETS, RESULTS
from benchmarks.nets import CASES
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.report import threads_text

_NAMES = [case.name for case in CASES.values()]

Row = dict[str, Any]


def tables() -> dict[str, str]:
    """Return the tables by name."""
    content = json.loads((RESULTS / "cpu.json").read_text(encoding="utf-8"))["tables"]
    measured = {found["title"]: {row[""]: row for row in found["rows"]} for found in content}

    def of(title: str, net: str, method: str) -> Row:
        return measured[title.format(net)][method]

    def turns(threads: int) -> Callable[[str, str], Row]:
        return lambda net, method: of(f"throughput, {{}}, {threads_text(threads)}", net, method)

    one, two = turns(1), turns(2)
    return {
        "throughput": _by_net(lambda net, method: _samples(one(net, method))),
        "throughput-threads": _by_net(lambda net, method: _quotient(one(net, method), two(net, method))),
        "throughput-memory": _by_net(lambda net, method: f"{of('memory of optimizers, {}', net, method)['MiB']:.0f}"),
        "scaling": _exponents(measured["scaling, exponents"]),
    }


def _by_net(cell: Callable[[str, str], str]) -> str:
    rows = [[method, *(cell(net, method) for net in _NAMES)] for method in OPTIMIZERS]
    return table(["", *(NETS[net] for net in _NAMES)], rows)


def _samples(row: Row) -> str:
    samples = row["samples / s"]
    return f"{samples:,.{0 if samples >= 100 else 1}f} ({row['ratio']:.2f})"


def _quotient(one: Row, two: Row) -> str:
    return f"{one['ms'] / two['ms']:.2f}"


def _exponents(rows: dict[str, Row]) -> str:
    methods = [method for method in OPTIMIZERS if method in next(iter(rows.values()))]
    return table(["", *rows], [[method, *(f"{row[method]:.2f}" for row in rows.values())] for method in methods])
