"""Tables of the documentation of what benchmarks on a CPU and the study have left behind."""

from __future__ import annotations

import functools
import json
import re
import statistics

from benchmarks.evidence.markdown import table
from benchmarks.evidence.measured import (
    ADAMW,
    FORWARD,
    KRONECKER,
    NETS,
    OURS,
    net_without_batch,
    note_of,
    row_of,
    there,
    titles,
)
from benchmarks.study import report, results
from benchmarks.study.tasks import TASKS, Task

METRIC_STEP = "step in the Kronecker metric, "
METRIC_KERNELS = "operators of the Kronecker metric, "
METRIC_ROWS = "Kronecker, median step", "Kronecker, mean step", "its slowest step over it"
OVER_ADAMW = "over AdamW's"


def tables() -> dict[str, str]:
    """Return the tables by name."""
    return {
        "cost": _cost(),
        "step-cost": _step_cost(),
        "metric-steps": _metric_steps(),
        "metric-kernels": _metric_kernels(),
        "parts": _parts(),
        "processes": _processes(),
        "kernels": _kernels(),
        "compiled": _compiled(),
        "study-chosen": _study("chosen"),
        "study-reported": _study("reported"),
    }


def _cost() -> str:
    rows = []
    for net in NETS:
        time = there("cpu", "step, overview, 1 thread", net)[OURS].split()[0]
        memory = row_of("cpu", f"memory, {net}", OURS)
        rows.append([net_without_batch(net), time, f"{memory['ratio']:.2f}" if memory else ""])
    return table(["", "time", "memory"], rows)


def _step_cost() -> str:
    columns = [OURS, "floor", FORWARD, "plain PyTorch CurveBall", "plain / CurveBall"]
    rows = []
    for net, about in NETS.items():
        row = there("cpu", "step, overview, 1 thread", net)
        first, *others = (row[column] for column in columns)
        rows.append([about, first, *(text.split()[0] for text in others)])
    heads = ["", "`CurveBall`", "multiply-adds", '`curvature="forward"`', "plain PyTorch", "plain / `CurveBall`"]
    return table(heads, rows)


def _metric_steps() -> str:
    rows = []
    for title in titles("metric", METRIC_STEP):
        net, _, batch = title.removeprefix(METRIC_STEP).rpartition(", batch ")
        median, mean, slowest = (there("metric", title, name) for name in METRIC_ROWS)
        ratios = [f"{row[OVER_ADAMW]:.2f}" for row in (median, mean, slowest)]
        low, high = (f"{mean[f'{OVER_ADAMW} {end}']:.2f}" for end in ("p20", "p80"))
        about = net_without_batch(net) if net in NETS else net
        milliseconds = adamw_milliseconds(title)
        rows.append(
            [f"{about}, batch {int(batch):,}", milliseconds, ratios[0], f"{ratios[1]} ({low}-{high})", ratios[2]]
        )
    return table(["", "AdamW, ms", "median step", "mean step", "slowest over median"], rows)


def adamw_milliseconds(title: str) -> str:
    """Return AdamW's median step, which only the note of such a table has."""
    found = re.search(r"AdamW takes ([\d.e+]+) ms", note_of("metric", title))
    assert found is not None
    return f"{float(found[1]):.3g}"


def _metric_kernels() -> str:
    rows = []
    for title in titles("metric", METRIC_KERNELS):
        ratios = [there("metric", title, "native")[f"ratio{end}"] for end in ("", " p20", " p80")]
        middle, low, high = (f"{ratio:.2f}" for ratio in ratios)
        rows.append([title.removeprefix(METRIC_KERNELS), f"{middle} ({low}-{high})"])
    return table(["matrices", "over plain torch"], rows)


def _parts() -> str:
    rows = []
    for name, about in (
        ("AdamW, fused", "AdamW, gradients summed up in `.grad`"),
        (OURS, OURS),
        (KRONECKER, KRONECKER),
    ):
        gpt, mlp = (there("parts", f"a batch in parts, {net}", name) for net in ("small GPT", "MNIST MLP"))
        memory = f"{gpt['whole, MiB']:.0f}, {gpt['4 parts, MiB']:.0f}"
        rows.append([about, f"{gpt['ratio']:.2f}", memory, f"{mlp['ratio']:.2f}"])
    heads = ["", "small GPT, batch 32: time", "MiB, whole and in parts", "MLP 784-256-256-10, batch 128: time"]
    return table(heads, rows)


def _processes() -> str:
    rows = []
    for name, about in ((ADAMW, "AdamW in `DistributedDataParallel`"), (OURS, OURS), (KRONECKER, KRONECKER)):
        nets = "small GPT", "MNIST MLP"
        found = [there("parts", f"data parallel, {net}", name)["times as fast"] for net in nets]
        rows.append([about, *(f"{ratio:.2f}" for ratio in found)])
    return table(["times as fast", "small GPT, batch 32", "MLP 784-256-256-10, batch 128"], rows)


def _kernels() -> str:
    operators = {
        "ops.update_": ("update_, {}", "`ops.update_`, over fused SGD's step"),
        "ops.dots, three sums": ("dots, {}", "`ops.dots`, three sums in double, over one `torch.dot`"),
    }
    threads = "1 thread", "2 threads"
    rows = [
        [about, *(f"{there('cpu', title.format(count), name)['ratio']:.2f}" for count in threads)]
        for name, (title, about) in operators.items()
    ]
    return table(["", *threads], rows)


def _compiled() -> str:
    rows = []
    means: list[tuple[float, float]] = []
    for net, about in NETS.items():
        row = row_of("cpu", f"compiled step, {net}", OURS)
        if row is None:
            continue
        ratio, over_eager = row["ratio"], row["over eager SGD"]
        means.append((ratio, over_eager))
        spread = f"{ratio:.2f} ({row['ratio p20']:.2f}-{row['ratio p80']:.2f})"
        rows.append(
            [about, spread, f"{over_eager:.2f}", f"{row['first step, s']:.2g} s", f"{row['from the cache, s']} s"]
        )
    geometric = [f"{statistics.geometric_mean(values):.2f}" for values in zip(*means, strict=True)]
    heads = ["", "over compiled SGD", "over eager SGD", "first step", "first step, code on disk"]
    return table(heads, [*rows, ["geometric mean", *geometric, "", ""]])


def _study(half: str) -> str:
    rows = []
    for name, task in TASKS.items():
        if task.half != half:
            continue
        runs = report.runs_of(name, results.FOLDER)
        by_method = study_rows(name)
        best = report.best(runs, report.ADAM_AND_SGD)
        assert best is not None
        theirs, ours = by_method[best], by_method[report.DEFAULTS]
        finals = [_validation(task, row) for row in (theirs, ours)]
        losses = [row["final train"] for row in (theirs, ours)]
        shares = short(ours["share of steps"]), short(ours["over the baseline's"] or "never")
        rows.append([task.about, best, *losses, *shares, *finals])
    heads = ["task", "best", "its loss", "ours at the end", "steps", "seconds", "its validation", "ours"]
    return table(heads, rows)


@functools.cache
def study_times() -> dict[str, report.Times]:
    """Return what steps of the study take, by task."""
    content = json.loads((results.FOLDER / "times.json").read_text(encoding="utf-8"))
    return dict(content["tasks"])


def study_rows(task: str) -> dict[str, dict[str, str]]:
    """Return the rows of the study's report on a task, by method and column."""
    found = report.rows(task, report.runs_of(task, results.FOLDER), report.ADAM_AND_SGD, study_times().get(task, {}))
    return {row["method"]: row for row in (dict(zip(report.COLUMNS, cells, strict=True)) for cells in found)}


def _validation(task: Task, row: dict[str, str]) -> str:
    """Return the validation error of a row of the report, or where there is none the validation loss."""
    return f"{100 * float(row['validation error']):.1f} %" if task.error else row["final validation"]


def short(text: str) -> str:
    """Return a share with two digits after the point; a word as it is."""
    try:
        return f"{float(text):.2f}"
    except ValueError:
        return text
