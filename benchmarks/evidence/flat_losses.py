"""Train on losses without curvature in the outputs: `python -m benchmarks.evidence.flat_losses`.

A small net in full batch, by CurveBall as published, which puts a substitute in the place of the missing curvature, and
by gradient descent at the rate 1, which a first step on the damping λ = 1 alone would be. It takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.evidence.markdown import table
from benchmarks.evidence.records import Records
from curveball_fused import CurveBall

RECORDS = Records("flat_losses", ("loss", "method"))
SHOWN = 1, 31, 200  # before these steps
HUGE = 1e100  # above it the size of a loss says nothing but that the run has diverged
CURVEBALL, GRADIENT_DESCENT = "CurveBall", "gradient descent"

_GENERATOR = torch.Generator().manual_seed(0)
X = 10 * torch.randn(64, 6, generator=_GENERATOR, dtype=torch.float64)
Y = torch.randint(0, 3, (64,), generator=_GENERATOR)
TARGET = 2 * torch.randn(64, 3, generator=_GENERATOR, dtype=torch.float64)
SIGNS = 2.0 * F.one_hot(Y, 3) - 1


def _pinball(o: Tensor) -> Tensor:
    return torch.maximum(0.9 * (TARGET - o), 0.1 * (o - TARGET)).mean()


def _multi_margin(o: Tensor) -> Tensor:
    return (1 + o - o.gather(1, Y[:, None])).relu().mean()


def _samples(o: Tensor) -> Tensor:
    return F.cross_entropy(o, Y, reduction="none")


# What the model makes of the last layer's values, and the loss of that.
LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "a multiple of `F.nll_loss` of log-probabilities": (
        lambda o: o.log_softmax(1),
        lambda o: 2 * F.nll_loss(o, Y, reduction="none").mean(),
    ),
    "the same, with `softmax(...).log()` in the model": (
        lambda o: o.softmax(1).log(),
        lambda o: 2 * F.nll_loss(o, Y, reduction="none").mean(),
    ),
    "`F.kl_div` of log-probabilities": (
        lambda o: o.log_softmax(1),
        lambda o: F.kl_div(o, TARGET.softmax(1), reduction="batchmean"),
    ),
    "cross-entropy in the model": (lambda o: F.cross_entropy(o, Y), lambda loss: loss),
    "cross-entropy of samples in the model, `mean`": (_samples, torch.mean),
    "the same, `sum`": (_samples, torch.sum),
    "squared error in the model": (lambda o: F.mse_loss(o, TARGET), lambda loss: loss),
    "`F.l1_loss`": (lambda o: o, lambda o: F.l1_loss(o, TARGET)),
    "hinge, `(1 - y * o).relu().mean()`": (lambda o: o, lambda o: (1 - SIGNS * o).relu().mean()),
    "pinball": (lambda o: o, _pinball),
    "multi-margin": (lambda o: o, _multi_margin),
    "`-q.tanh().mean()`": (lambda o: o.tanh(), lambda q: -q.mean()),
    "`F.triplet_margin_loss`, concave along many steps": (
        lambda o: o,
        lambda o: F.triplet_margin_loss(o[:21], o[21:42], o[42:63]),
    ),
}


def train(loss: str, method: str) -> list[float]:
    """Return the losses before the steps that are shown."""
    head, loss_fn = LOSSES[loss]
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).double()

    def model_fn() -> Tensor:
        return head(net(X))

    if method == CURVEBALL:
        optimizer = CurveBall(net.parameters())
        losses = [float(optimizer.step(model_fn, loss_fn)[0]) for _ in range(max(SHOWN))]
        return [losses[step - 1] for step in SHOWN]
    losses = []
    for _ in range(max(SHOWN)):
        net.zero_grad()
        value = loss_fn(model_fn())
        value.backward()
        with torch.no_grad():
            for p in net.parameters():
                assert p.grad is not None
                p.sub_(p.grad)
        losses.append(float(value))
    return [losses[step - 1] for step in SHOWN]


def tables() -> dict[str, str]:
    """Return the table of docs/losses.md."""
    found = {(run["loss"], run["method"]): run["losses"] for run in RECORDS.read()}
    rows = [[loss, *map(_text, found[loss, CURVEBALL]), _text(found[loss, GRADIENT_DESCENT][-1])] for loss in LOSSES]
    heads = ["loss", f"step {SHOWN[0]}", *map(str, SHOWN[1:]), f"gradient descent, {SHOWN[-1]}"]
    return {"flat-losses": table(heads, rows)}


def _text(loss: float | None) -> str:
    if loss is None or not math.isfinite(loss):
        return "not finite"
    return f"above {HUGE:g}" if loss > HUGE else f"{loss:.3g}"


def main() -> None:
    torch.set_num_threads(1)
    runs = ({"loss": loss, "method": method} for loss in LOSSES for method in (CURVEBALL, GRADIENT_DESCENT))
    for run in RECORDS.missing(runs):
        RECORDS.add(run | {"losses": train(run["loss"], run["method"])})


if __name__ == "__main__":
    main()
