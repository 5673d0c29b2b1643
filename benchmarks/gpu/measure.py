"""Timing on the GPU: alternatives take turns, between events, behind a delay in which the host queues the work.

So a time is the device's, however slow the host, as long as the work is queued before it begins. Where it was not, the
figure carries a mark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from benchmarks.compare import Spread
from benchmarks.report import Report, bar
from benchmarks.steps import repeated
from tests.gpu.device import BACKENDS

Call = Callable[[], object]

ROUNDS = 20
DELAY = 8_000_000  # cycles, some 4 ms
COPY = "torch copy_"
COPY_BYTES = 8e9  # read and written by the fixture `copy`
# Time over that of copying as many bytes. 1.11: 90 % of the bandwidth of a copy.
BANDWIDTH_BAR = 1.11


class Measured(NamedTuple):
    """Seconds of each round for each call; for those that raised, why; and a mark behind the times of those whose work
    mostly had begun before the host had queued all of it."""

    seconds: dict[str, list[float]]
    errors: dict[str, str]
    marks: dict[str, str]


MARK = "*: began before the host had queued all of it, so the host may show in it and in ratios to it."


def in_a_row(step: Call, count: int) -> Callable[[], None]:
    """`count` steps, and waiting for them."""
    steps = repeated(step, count)

    def run() -> None:
        steps()
        torch.cuda.synchronize()

    return run


def in_turn(calls: Mapping[str, Call], rounds: int = ROUNDS) -> Measured:
    """Times `calls`, which run twice beforehand, so that nothing is slow for being the first."""
    seconds: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    for name, call in calls.items():
        try:
            call()
            call()
            torch.cuda.synchronize()
            seconds[name] = []
        except Exception as error:
            errors[name] = f"error: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            torch.cuda.empty_cache()
    spans, early = [], dict.fromkeys(seconds, 0)
    for _ in range(rounds):
        for name in seconds:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(DELAY)
            start.record()
            calls[name]()
            end.record()
            early[name] += start.query()
            spans.append((name, start, end))
    torch.cuda.synchronize()
    for name, start, end in spans:
        seconds[name].append(1e-3 * start.elapsed_time(end))
    return Measured(seconds, errors, {name: "*" if 2 * count > rounds else "" for name, count in early.items()})


def ratio(a: list[float], b: list[float], scale: float = 1.0) -> Spread:
    """a / b, round by round."""
    return Spread.of([scale * x / y for x, y in zip(a, b, strict=True)])


def as_text(spread: Spread) -> str:
    """Median, and 20th and 80th percentiles."""
    return f"{spread.median:.3g} ({spread.p20:.3g}-{spread.p80:.3g})"


def bandwidth_table(
    report: Report,
    title: str,
    note: str,
    copy: Call,
    calls: Mapping[str, Call],
    traffic: float,
    copy_bar: float,
    baseline: str,
    baseline_bar: float | None = None,
) -> None:
    """Measures `calls`, which all do the same work, and adds a table.

    Args:
        traffic: bytes that the work must at least read and write.
        copy_bar: the most that a backend's time may be over that of copying as many bytes.
        baseline: one of `calls`.
        baseline_bar: the most that a backend's time may be over the baseline's.
    """
    seconds, errors, marks = in_turn({COPY: copy, **calls})
    beside = f"/ {baseline}"
    rows: list[dict[str, Any]] = []
    for name in (COPY, *calls):
        row: dict[str, Any] = {
            "": name,
            "ms": errors.get(name),
            "GB/s": None,
            "/ copy": None,
            beside: None,
            "bar": None,
        }
        if name in seconds:
            own, moved, verdicts = seconds[name], COPY_BYTES if name == COPY else traffic, []
            spread, over_copy = Spread.of(own), ratio(own, seconds[COPY], COPY_BYTES / moved)
            row["ms"] = as_text(Spread(1e3 * spread.median, 1e3 * spread.p20, 1e3 * spread.p80)) + marks[name]
            row["GB/s"], row["/ copy"] = round(1e-9 * moved / spread.median), as_text(over_copy)
            verdicts.append(f"/ copy {bar(over_copy, copy_bar)}")
            if baseline in seconds and name != COPY:
                over_baseline = ratio(own, seconds[baseline])
                row[beside] = as_text(over_baseline)
                if baseline_bar:
                    verdicts.append(f"/ {baseline} {bar(over_baseline, baseline_bar)}")
            if name in BACKENDS:
                row["bar"] = "; ".join(verdicts)
        rows.append(row)
    explanation = (
        f"Median (20th-80th percentile) of {ROUNDS} rounds, device time. Counted: {traffic / 1e9:.3g} GB, what has to "
        f"be read and written once. / copy: time over that of copying as many bytes. {MARK}"
    )
    report.add(title, f"{note} {explanation}", rows)
    assert not errors, errors
