"""What the pages say in their text of figures, computed from the raw data.

A sentence need not be a whole one: it begins and ends where the text around it has no figures. `tests/evidence/` looks
whether the pages have all of these, and whether they have other figures.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks.evidence import (
    demo,
    fuzz,
    network_tables,
    networks,
    published,
    robustness,
    robustness_tables,
    soak,
)
from benchmarks.evidence.contest import contestants, times
from benchmarks.evidence.contest import tables as contest_tables
from benchmarks.evidence.contest.score import RECORDS as CONTEST
from benchmarks.evidence.contest.score import score
from benchmarks.evidence.gpu_tables import H100, H200
from benchmarks.evidence.kept import (
    METRIC_ROWS,
    METRIC_STEP,
    OVER_ADAMW,
    adamw_milliseconds,
    short,
    study_rows,
    study_times,
)
from benchmarks.evidence.measured import (
    FORWARD,
    KRONECKER,
    NETS,
    OURS,
    median,
    note_of,
    row_of,
    span,
    there,
    titles,
)
from benchmarks.evidence.network_times import TIMES
from benchmarks.evidence.problems import PROBLEMS
from benchmarks.study import report, results
from benchmarks.study.tasks import TASKS

_ROOT = Path(__file__).resolve().parents[2]
HALVES = "chosen", "reported"
_WORDS = (
    "no one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
).split()


@functools.cache
def sentences() -> dict[str, list[str]]:
    """Return them by page, as they must stand there but for line breaks."""
    return {
        "README.md": [*_study_in_words(), *_on_random_nets(), *_in_the_contest(), _as_published(), _eager()],
        "docs/performance.md": [
            *_study(),
            _on_two_threads(),
            *_metric(),
            _memory(),
            _sent(),
            _tangents(),
            *_on_a_gpu(),
            _compiled(),
        ],
        "docs/cheaper-steps.md": _economy(),
        "docs/evidence-contest.md": [_perceptron_of_the_contest()],
        "docs/evidence-networks.md": _networks(),
        "docs/limits.md": [_demo(), _eager(), _slow_attention()],
        "docs/method.md": [_published()],
        "docs/trust.md": [_fuzzed(), _soaked()],
    }


def missing(page: str) -> list[str]:
    """Return the sentences that a page has not, or not with these figures."""
    text = " ".join((_ROOT / page).read_text(encoding="utf-8").split())
    return [sentence for sentence in sentences()[page] if sentence not in text]


def word(number: int) -> str:
    """Return the word of a number."""
    return _WORDS[number]


def in_words(values: Iterable[float]) -> str:
    """Return the range of values, from the whole number below to the one above."""
    low, high = _ends(values)
    return f"{word(math.floor(low))} to {word(math.ceil(high))}"


def _ends(values: Iterable[float]) -> tuple[float, float]:
    known = sorted(values)
    return known[0], known[-1]


# The study


def _summary(*halves: str) -> dict[str, str]:
    """Return the defaults' row of the study's summary, by column."""
    rows = report.summary(halves, results.FOLDER, report.ADAM_AND_SGD, study_times())
    return dict(zip(report.SUMMARY_COLUMNS, next(row for row in rows if row[0] == report.DEFAULTS), strict=True))


def _seconds() -> list[float]:
    """Return our seconds over the baseline's, for each task on which we came to where it ends."""
    ours = [study_rows(task)[report.DEFAULTS] for task in TASKS]
    return [float(row["over the baseline's"]) for row in ours if row["over the baseline's"]]


def _final_losses_higher() -> dict[str, int]:
    """Return by family of other optimizers on how many tasks its best final loss was higher than ours."""
    lower = report.finals(results.FOLDER)[-1][2:]
    return {family: int(cell.split()[0]) for family, cell in zip(report.FAMILIES, lower, strict=True)}


def _validation(task: str, method: str) -> str:
    runs = report.runs_of(task, results.FOLDER)
    loss = results.mean(run.final_validation for run in runs[method].values())
    assert loss is not None
    return f"{loss:.2f}"


def _study_in_words() -> list[str]:
    both = _summary(*HALVES)
    reached, sooner = (int(both[column].split()[0]) for column in ("reached it on", "sooner on"))
    soap = len(TASKS) - _final_losses_higher()["SOAP"]
    return [
        f"it reached that one's final loss on {word(reached)}, in {both['range']} of the steps.",
        f"it was there sooner on {word(sooner)}, in {span((s for s in _seconds() if s <= 1), '.2f')} of the seconds "
        f"({short(both['median of seconds'])} on the median of all {word(len(TASKS))})",
        f"settings of SOAP ended lower on {word(soap)}.",
    ]


def _study() -> list[str]:
    chosen, reported, both = (_summary(*halves) for halves in (("chosen",), ("reported",), HALVES))
    seconds = [short(row["median of seconds"]) for row in (chosen, reported, both)]
    higher = _final_losses_higher()
    best = report.best(report.runs_of("mlp_2048", results.FOLDER), report.ADAM_AND_SGD)
    assert best is not None
    ours, theirs, cosine = (_validation("mlp_2048", name) for name in (report.DEFAULTS, best, "Kronecker, cosine"))
    return [
        f"It was there sooner on {both['sooner on']} tasks, with {seconds[0]} of the seconds on the median task of the "
        f"first half and {seconds[1]} on that of the second, {seconds[2]} on that of all.",
        f"(in the large batch {ours}, {best.split()[0]} {theirs})",
        f"higher than ours on {higher['SOAP']} of the {len(TASKS)} tasks with SOAP, on {higher['Muon']} with Muon "
        f"(beside AdamW), on {higher['Schedule-Free']} with Schedule-Free AdamW and on {higher['Prodigy']} with "
        "Prodigy.",
        f"at a higher training loss: {cosine} for {ours} in the large batch.",
    ]


# Steps on a CPU


def _over_sgd(threads: str) -> dict[str, float]:
    """Return the time of a step as published over one of SGD, by net."""
    return {net: median(there("cpu", f"step, overview, {threads}", net)[OURS]) for net in NETS}


def _as_published() -> str:
    return f"{in_words(_over_sgd('1 thread').values())} times the time of a step of SGD"


def _on_two_threads() -> str:
    return f"On two threads the mean is {_over_sgd('2 threads')['geometric mean']:.2f}."


def _compiled() -> str:
    ratios = [ratio for net, ratio in _over_sgd("1 thread").items() if net != "geometric mean"]
    return f"the uncompiled step, with its fused tangents, takes {span(ratios, '.1f')} eager SGD steps"


def _metric() -> list[str]:
    tiny = next(title for title in titles("metric", METRIC_STEP) if "8-64-64-4" in title)
    slowest = [there("metric", title, METRIC_ROWS[2])[OVER_ADAMW] for title in titles("metric", METRIC_STEP)]
    study = [found[report.DEFAULTS] for found in study_times().values()]
    ratios = [found["slowest_step"] / found["median_step"] for found in study]
    return [
        f"one of {float(adamw_milliseconds(tiny)):.1f} ms with AdamW",
        f"The slowest step takes {span(slowest, '.1f')} median ones, "
        f"and {span(ratios, '.1f')} on the tasks of the study",
    ]


def _memory() -> str:
    def ratio(net: str, name: str) -> float:
        return float(there("cpu", f"memory, {net}", name)["ratio"])

    vit = there("cpu", "memory, small ViT", OURS)
    forward = [ratio(net, FORWARD) for net in NETS if row_of("cpu", f"memory, {net}", FORWARD)]
    return (
        f"{ratio('Basic+BN', OURS):.2f} CIFAR net, {ratio('ResNet-18', OURS):.2f} ResNet-18, "
        f"{ratio('small GPT', OURS):.2f} GPT, {ratio('small ViT', OURS):.2f} "
        f"({vit['ratio p20']:.2f}-{vit['ratio p80']:.2f}) ViT; "
        f'with `curvature="forward"` {span(forward, ".2f")}.'
    )


def _sent() -> str:
    ours, metric = (there("parts", "data parallel, small GPT", name)["sent, bytes"] for name in (OURS, KRONECKER))
    return f"{ours:,.0f} bytes a step for the GPT as published, and {metric:,.0f} in the Kronecker metric, on average"


def _tangents() -> str:
    def ratio(title: str, name: str = "activation, three products") -> str:
        return f"{there('cpu', title, name)['ratio']:.2f}"

    def batch_norm(layout: str) -> str:
        return ratio(f"batch_norm_tangent, {layout}", "batch_norm_tangent")

    attention = [ratio(title, "attention_tangent") for title in titles("cpu", "attention_tangent")]
    return (
        f"layer norm {ratio('layer_norm_tangent', 'layer_norm_tangent')}, batch norm {batch_norm('contiguous')} "
        f"(channels last {batch_norm('channels-last')}), attention {' and '.join(attention)}, "
        f"GELU {ratio('activation, gelu')}, its approximation {ratio('activation, gelu_tanh')}, "
        f"SiLU {ratio('activation, silu')}."
    )


def _economy() -> list[str]:
    eighth = "average=0.8, curvature of 1/8"
    all_titles = titles("economy", "Economy: ")
    larger = [title for title in all_titles if "mlp" not in title]
    part, whole = ([there("economy", title, name)["time / SGD"] for title in larger] for name in (eighth, OURS))
    largest = max(there("economy", title, OURS)["ρ max"] for title in all_titles)
    return [
        f"{span(part, '.1f')} where the net is not tiny ({span(whole, '.1f')} with that of the whole)",
        f"seen as ρ of up to {largest:.0f} in single steps.",
    ]


# Steps and kernels on a GPU


def _eager() -> str:
    ratios = [row["ratio"] for net in NETS if (row := row_of(H100, f"step, {net}", "cuda"))]
    return f"takes {in_words(ratios)} SGD steps"


def _attention(about: str) -> list[float]:
    """Return the tangent's times over torch's; `about` has what the title must have, such as `x 64 float32`."""
    found = (title for title in titles(H100, "attention_tangent") if about in title)
    return [median(there(H100, title, "triton")["/ torch"]) for title in found]


def _slow_attention() -> str:
    return f"up to {word(math.ceil(max(_attention('x 128 float32'))))} times with heads of 128 columns"


def _on_a_gpu() -> list[str]:
    small = titles(H100, "batch_norm_tangent, (128, 512, 7, 7)")
    megabytes = [1e3 * float(note_of(H100, title).partition("Counted: ")[2].split()[0]) for title in small]
    microseconds = [1e3 * median(there(H100, title, "triton")["ms"]) for title in small]
    mlp = there(H100, "step, MNIST MLP", "cuda")["ms"]
    graphed = there(H100, "graphed step, MNIST MLP", "CurveBall, graphed")["ms"]
    ways = "QR", "Cholesky-QR, twice, float64"
    qr, cholesky = (float(there(H200, "refresh, 72 of 128 x 128", way)["µs"]) / 1e3 for way in ways)
    stacks = "the Kronecker metric by stacks, GPT-2 small"
    four, one = (median(there(H200, stacks, f"up to 2^{power}")["ms"]) for power in (22, 20))
    return [
        f"batch norm of {span(megabytes, '.0f')} MB takes {span(microseconds, '.0f')} µs.",
        f"takes {span(_attention('x 64 bfloat16'), '.2f')} of torch's time in bfloat16 with heads of 64 columns, "
        f"and {span(_attention('x 128 bfloat16'), '.1f')} with 128;",
        f"{span(_attention('float32'), '.1f')} times as long.",
        f"of the MLP's {mlp:.1f} ms it works for {graphed:.2f}",
        f"a refresh of 72 matrices of 128 x 128 takes {qr:.0f} ms by QR and {cholesky:.2f} by Cholesky decompositions",
        f"direction and factors take {four:.1f} ms for GPT-2 with stacks of matrices of up to four million elements, "
        f"{one:.1f} with those of one million.",
    ]


# Evidence


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
    ours, targets = found[contestants.KRONECKER], len(found[contestants.KRONECKER])
    other = next(name for name in found if "CurveBall" not in name)
    reached = {name: sum(map(math.isfinite, found[name])) for name in (contestants.KRONECKER, other)}
    return [
        f"It had a score of {score(ours):.2f} and reached {reached[contestants.KRONECKER]} of the {targets} targets;",
        f"was {other}, with {score(found[other]):.2f} and {reached[other]}.",
    ]


def _perceptron_of_the_contest() -> str:
    names = contestants.KRONECKER, "Muon + AdamW"
    ours, muon = (times.relative_cost(times.read(), "mlp", name) for name in names)
    lowest = contest_tables.lowest_over_target(contest_tables.of(CONTEST.read(), "mlp", contestants.KRONECKER))
    return (
        f"a step of the Kronecker metric takes {ours:.1f} times as long as AdamW's there, one of Muon {muon:.1f}, "
        f"and the metric ends {100 * (lowest - 1):.0f} % above the target."
    )


def _networks() -> list[str]:
    runs, measured = networks.RECORDS.read(), TIMES.read()
    mlps = [network_tables.cost(each, networks.KRONECKER) for each in measured if "mlp" in each["network"]]
    as_published = [network_tables.cost(each, networks.ADAPTING) for each in measured]
    both = networks.KRONECKER, "SGD"
    errors = [100 * network_tables.mean_error(runs, "resnet18", method, "validation") for method in both]
    low, high = _ends(run["steps"] for run in runs)
    return [
        f"one of the metric takes {span(mlps, '.1f')} times as long",
        f"level on ResNet-18 without ({span(errors, '.1f')} %, which the table counts as ahead)",
        f"a step costs {span(as_published, '.1f')} times as much",
        f"The runs are short, {low:,} to {high:,} steps",
    ]


def _demo() -> str:
    runs = demo.RECORDS.read()
    ours, sgd = (
        statistics.mean(run["seconds"][-1] / run["steps"][-1] for run in runs if run["optimizer"].startswith(name))
        for name in ("CurveBall, Kronecker", "SGD")
    )
    return f"In the Kronecker metric a step took {ours / sgd:.1f} SGD steps on the digits"


def _published() -> str:
    records = published.RECORDS.read()
    runs = [published.reported_runs(records, problem, "CurveBall") for problem in PROBLEMS]
    found = [published.spread(each, "iterations") for each in runs]
    return (
        f"the Rosenbrock function is solved in {found[0]} iterations without noise, {found[1]} and {found[2]} with it, "
        f"and a two-layer linear network of condition number 10⁵ in {found[3]}."
    )


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
