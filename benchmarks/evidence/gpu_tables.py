"""Tables of the documentation of what `make gpu` has left behind."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.evidence.markdown import table
from benchmarks.evidence.measured import ADAMW, NETS, median, net_without_batch, row_of, span, there, titles

H100, H200 = "gpu-h100", "gpu-h200"


def tables() -> dict[str, str]:
    """Return the tables by name."""
    return {
        "gpu-kernels": _kernels(),
        "gpu-eager": _steps(H100, "step, {}", "cuda", ["", "eager, ms", "over SGD"]),
        "gpu-graphed": _steps(
            H200, "graphed step, {}", "CurveBall, graphed", ["", "graphed, ms", "over a graphed SGD step"]
        ),
        "gpu-metric": _metric(),
    }


def _kernels() -> str:
    cross_entropy, sgd = "cross_entropy_cotangent, {}", ("torch.optim.SGD, fused", "fused SGD's step")
    rows = [
        _kernel("`ops.update_`, 10⁹ float32 parameters", ["update_, 10⁹ float32"], *sgd),
        _kernel("`ops.dots`, three sums in double", ["dots, 10⁹ float32"], "torch.dot, one sum", "one `torch.dot`"),
        _kernel("mean squared error", ["mse_cotangent, 2²⁷ float32", "mse_products, 2²⁷ float32"]),
        _kernel("cross-entropy, 1048576 x 10 (H200)", [cross_entropy.format("1048576 x 10 float32")], file=H200),
        _kernel("cross-entropy, 65536 x 1000", [cross_entropy.format("65536 x 1000 float32")]),
        _kernel("cross-entropy, 8192 x 50257, bfloat16", [cross_entropy.format("8192 x 50257 bfloat16")]),
        _kernel("cross-entropy, 8192 x 50257, float32", [cross_entropy.format("8192 x 50257 float32")]),
        _tangent("layer norm's tangent", "layer_norm_tangent"),
        _tangent("batch norm's tangent, 128 x 64 x 56 x 56", "batch_norm_tangent, (128, 64, 56, 56)"),
        _tangent("activations' tangents", "activation "),
    ]
    return table(["", "over a copy", "over torch"], rows)


def _kernel(
    about: str, tables: Sequence[str], other: str = "torch.compile", named: str = "`torch.compile`", file: str = H100
) -> list[str]:
    rows = [there(file, title, "cuda") for title in tables]
    return [
        about,
        _spread([row["/ copy"] for row in rows]),
        f"{_spread([row[f'/ {other}'] for row in rows])} of {named}",
    ]


def _tangent(about: str, begin: str) -> list[str]:
    rows = [there(H100, title, "triton") for title in titles(H100, begin)]
    return [f"{about} (Triton)", *(_spread([row[column] for row in rows]) for column in ("/ copy", "/ torch"))]


def _spread(cells: Sequence[str]) -> str:
    """Return the range of the medians of cells."""
    return span(map(median, cells), ".2f", between="-")


def _steps(file: str, title: str, name: str, heads: list[str]) -> str:
    rows = []
    for net in NETS:
        if row := row_of(file, title.format(net), name):
            rows.append([net_without_batch(net), f"{row['ms']:.2g}", f"{row['ratio']:.2g}"])
    return table(heads, rows)


def _metric() -> str:
    rows = []
    for net, about in (("GPT-2 small", "8 x 1024 tokens"), ("ResNet-50", "64 images of 224 x 224")):
        title = f"step in the Kronecker metric, {net}"
        adamw, eager, graphed = (there(H200, title, name) for name in (ADAMW, "cuda", "graphed"))
        ratios = [row["mean step / AdamW's"] for row in (eager, graphed)]
        rows.append([f"{net}, {about}", f"{adamw['ms']:.0f}", *(f"{ratio:.2f}" for ratio in ratios)])
    return table(["", "AdamW, ms", "eager", "graphed"], rows)
