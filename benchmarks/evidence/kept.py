"""Tables and sentences of the documentation of what benchmarks, the study, fuzzing and the soak have left behind."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.evidence import fuzz, robustness, robustness_tables, soak
from benchmarks.evidence.contest import tables as contest_tables
from benchmarks.evidence.contest.contestants import KRONECKER as KRONECKER_ENTRY
from benchmarks.evidence.contest.score import score
from benchmarks.evidence.markdown import table
from benchmarks.study import report, results
from benchmarks.study.tasks import TASKS, Task

RESULTS = Path(__file__).resolve().parents[1] / "results"
NETS = {
    "MNIST MLP": "MLP 784-256-256-10, batch 128",
    "small GPT": "small GPT, batch 32",
    "small ViT": "small ViT, batch 16",
    "Basic+BN": "CIFAR net with batch norm, batch 128",
    "ResNet-18": "ResNet-18, batch 32",
    "geometric mean": "geometric mean",
}
ADAMW, OURS, KRONECKER = "AdamW, fused", "CurveBall", 'CurveBall, "kronecker"'

_OTHERS = "SOAP", "Muon", "Schedule-Free", "Prodigy"

Rows = list[dict[str, Any]]


def tables() -> dict[str, str]:
    """Return the tables by name."""
    return {
        "cost": _cost(),
        "step-cost": _step_cost(),
        "parts": _parts(),
        "processes": _processes(),
        "gpu-metric": _gpu_metric(),
        "kernels": _kernels(),
        "compiled": _compiled(),
        "gpu-eager": _gpu_steps("gpu-h100", "step, {}", "cuda", ["", "eager, ms", "over SGD"]),
        "gpu-graphed": _gpu_steps(
            "gpu-h200", "graphed step, {}", "CurveBall, graphed", ["", "graphed, ms", "over a graphed SGD step"]
        ),
        "study-chosen": _study("chosen"),
        "study-reported": _study("reported"),
    }


def sentences() -> dict[str, list[str]]:
    """Return by page what its text says of these figures, as it must stand there, but for line breaks."""
    times = json.loads((results.FOLDER / "times.json").read_text(encoding="utf-8"))["tasks"]

    def summary(*halves: str) -> list[str]:
        found = report.summary(halves, results.FOLDER, report.ADAM_AND_SGD, times)
        return next(row for row in found if row[0] == report.DEFAULTS)

    both = summary("chosen", "reported")
    _, _, _, _, shares, seconds, sooner = both
    by_half = [_short(summary(half)[5]) for half in ("chosen", "reported")]
    memory = {net: _row("cpu", f"memory, {net}", OURS) for net in NETS}
    ratios = {net: f"{row['ratio']:.2f}" for net, row in memory.items() if row}
    lower = report.finals(results.FOLDER)[-1]
    soap, muon, free, prodigy = (lower[2 + report.FAMILIES.index(f)].split()[0] for f in _OTHERS)
    return {
        "README.md": [
            f"in {shares} of the steps",
            f"({_short(seconds)} on the median of all seventeen)",
            *_on_random_nets(),
            *_in_the_contest(),
        ],
        "docs/performance.md": [
            f"It was there sooner on {sooner} tasks, with {by_half[0]} of the seconds on the median task of the first "
            f"half and {by_half[1]} on that of the second, {_short(seconds)} on that of all.",
            f"higher than ours on {soap} of the 17 tasks with SOAP, on {muon} with Muon (beside AdamW), on {free} with "
            f"Schedule-Free AdamW and on {prodigy} with Prodigy.",
            f"{ratios['Basic+BN']} CIFAR net, {ratios['ResNet-18']} ResNet-18, {ratios['small GPT']} GPT, "
            f"{ratios['small ViT']} (",
        ],
        "docs/trust.md": [_fuzzed(), _soaked()],
    }


def _on_random_nets() -> list[str]:
    nets = robustness_tables.runs("nets").values()
    diverged = sum(net[robustness.KRONECKER].diverged for net in nets)
    ahead = [
        sum(ratio < 1 for ratio in robustness_tables.ratios(robustness.KRONECKER, other, equal))
        for equal in ("epochs", "seconds")
        for other in (robustness.ADAM, robustness.SGD)
    ]
    return [
        f"{'no' if diverged == 0 else diverged} run of it diverged.",
        f"its loss was below untuned Adam's on {ahead[0]} and below untuned SGD's on {ahead[1]}; "
        f"after equal seconds on {ahead[2]} and {ahead[3]}.",
    ]


def _in_the_contest() -> list[str]:
    found = contest_tables.ranking()
    ours, targets = found[KRONECKER_ENTRY], len(found[KRONECKER_ENTRY])
    other = next(name for name in found if "CurveBall" not in name)
    reached = {name: sum(map(math.isfinite, found[name])) for name in (KRONECKER_ENTRY, other)}
    return [
        f"It had a score of {score(ours):.2f} and reached {reached[KRONECKER_ENTRY]} of the {targets} targets;",
        f"was {other}, with {score(found[other]):.2f} and {reached[other]}.",
    ]


def _fuzzed() -> str:
    runs = fuzz.RECORDS.read()
    cases, worked, refused, by_one = (
        sum(run[name] for run in runs) for name in ("cases", "worked", "refused", "refused by one backend")
    )
    return (
        f"{cases:,} cases: no crash and no wait; {worked:,} computed as plain torch does, {refused:,} refused with a "
        f"message, {by_one:,} refused by one backend and computed as plain torch does by the other"
    )


def _soaked() -> str:
    memory = {run["method"]: run["memory"] for run in soak.RECORDS.read()}
    ours, metric = (f"{found[0]:g} to {found[-1]:g} MiB" for found in (memory["published"], memory["kronecker"]))
    return f"resident memory from step 10,000 to the last: {ours}, and {metric}"


def _rows(file: str, title: str) -> Rows | None:
    text = (RESULTS / f"{file}.json").read_text(encoding="utf-8")
    return next((table["rows"] for table in json.loads(text)["tables"] if table["title"] == title), None)


def _row(file: str, title: str, name: str) -> dict[str, Any] | None:
    rows = _rows(file, title)
    return next((row for row in rows if row[""] == name), None) if rows else None


def _there(file: str, title: str, name: str) -> dict[str, Any]:
    row = _row(file, title, name)
    if row is None:
        raise KeyError(f"{file}.json has no row {name!r} of {title!r}")
    return row


def _cost() -> str:
    rows = []
    for net, about in NETS.items():
        time = _there("cpu", "step, overview, 1 thread", net)[OURS].split()[0]
        memory = _row("cpu", f"memory, {net}", OURS)
        rows.append([about.rpartition(", batch")[0] or about, time, f"{memory['ratio']:.2f}" if memory else ""])
    return table(["", "time", "memory"], rows)


def _step_cost() -> str:
    columns = [OURS, "floor", 'CurveBall, curvature="forward"', "plain PyTorch CurveBall", "plain / CurveBall"]
    rows = []
    for net, about in NETS.items():
        row = _there("cpu", "step, overview, 1 thread", net)
        first, *others = (row[column] for column in columns)
        rows.append([about, first, *(text.split()[0] for text in others)])
    heads = ["", "`CurveBall`", "multiply-adds", '`curvature="forward"`', "plain PyTorch", "plain / `CurveBall`"]
    return table(heads, rows)


def _parts() -> str:
    rows = []
    for name, about in (
        ("AdamW, fused", "AdamW, gradients summed up in `.grad`"),
        (OURS, OURS),
        (KRONECKER, KRONECKER),
    ):
        gpt, mlp = (_there("parts", f"a batch in parts, {net}", name) for net in ("small GPT", "MNIST MLP"))
        memory = f"{gpt['whole, MiB']:.0f}, {gpt['4 parts, MiB']:.0f}"
        rows.append([about, f"{gpt['ratio']:.2f}", memory, f"{mlp['ratio']:.2f}"])
    heads = ["", "small GPT, batch 32: time", "MiB, whole and in parts", "MLP 784-256-256-10, batch 128: time"]
    return table(heads, rows)


def _processes() -> str:
    rows = []
    for name, about in ((ADAMW, "AdamW in `DistributedDataParallel`"), (OURS, OURS), (KRONECKER, KRONECKER)):
        nets = "small GPT", "MNIST MLP"
        found = [_there("parts", f"data parallel, {net}", name)["times as fast"] for net in nets]
        rows.append([about, *(f"{ratio:.2f}" for ratio in found)])
    return table(["times as fast", "small GPT, batch 32", "MLP 784-256-256-10, batch 128"], rows)


def _gpu_metric() -> str:
    rows = []
    for net, about in (("GPT-2 small", "8 x 1024 tokens"), ("ResNet-50", "64 images of 224 x 224")):
        title = f"step in the Kronecker metric, {net}"
        adamw, eager, graphed = (_there("gpu-h200", title, name) for name in (ADAMW, "cuda", "graphed"))
        ratios = [row["mean step / AdamW's"] for row in (eager, graphed)]
        rows.append([f"{net}, {about}", f"{adamw['ms']:.0f}", *(f"{ratio:.2f}" for ratio in ratios)])
    return table(["", "AdamW, ms", "eager", "graphed"], rows)


def _kernels() -> str:
    operators = {
        "ops.update_": ("update_, {}", "`ops.update_`, over fused SGD's step"),
        "ops.dots, three sums": ("dots, {}", "`ops.dots`, three sums in double, over one `torch.dot`"),
    }
    threads = "1 thread", "2 threads"
    rows = [
        [about, *(f"{_there('cpu', title.format(count), name)['ratio']:.2f}" for count in threads)]
        for name, (title, about) in operators.items()
    ]
    return table(["", *threads], rows)


def _compiled() -> str:
    rows = []
    means: list[tuple[float, float]] = []
    for net, about in NETS.items():
        row = _row("cpu", f"compiled step, {net}", OURS)
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


def _gpu_steps(file: str, title: str, name: str, heads: list[str]) -> str:
    rows = []
    for net, about in NETS.items():
        if row := _row(file, title.format(net), name):
            rows.append([about.rpartition(", batch")[0], f"{row['ms']:.2g}", f"{row['ratio']:.2g}"])
    return table(heads, rows)


def _study(half: str) -> str:
    times = json.loads((results.FOLDER / "times.json").read_text(encoding="utf-8"))["tasks"]
    rows = []
    for name, task in TASKS.items():
        if task.half != half:
            continue
        runs = report.runs_of(name, results.FOLDER)
        by_method = {row[1]: row for row in report.rows(name, runs, report.ADAM_AND_SGD, times.get(name, {}))}
        best = report.best(runs, report.ADAM_AND_SGD)
        assert best is not None
        theirs, ours = by_method[best], by_method[report.DEFAULTS]
        finals = [_validation(task, row) for row in (theirs, ours)]
        rows.append([task.about, best, theirs[4], ours[4], _short(ours[3]), _short(ours[8] or "never"), *finals])
    heads = ["task", "best", "its loss", "ours at the end", "steps", "seconds", "its validation", "ours"]
    return table(heads, rows)


def _validation(task: Task, row: list[str]) -> str:
    """Return the validation error of a row of the report, or where there is none the validation loss."""
    return f"{100 * float(row[6]):.1f} %" if task.error else row[5]


def _short(text: str) -> str:
    """Return a share with two digits after the point; a word as it is."""
    try:
        return f"{float(text):.2f}"
    except ValueError:
        return text
