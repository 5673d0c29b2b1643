"""Steps of a batch in parts; as a program, the peak of resident memory in MiB of a process that takes three of them.

    python -m benchmarks.parts <case> <method> <parts>

No parts: what importing everything takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory_worker import peak_mib
from benchmarks.nets import CASES, Case
from curveball_fused import CurveBall


def adamw(case: Case, parts: int) -> Callable[[], Tensor]:
    """AdamW, with gradients accumulated over parts."""
    model, x, y = case.make()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        for x_i, y_i in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = F.cross_entropy(model(x_i), y_i) / parts
            loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def curveball(case: Case, parts: int, preconditioner: str | None) -> Callable[[], Tensor]:
    model, x, y = case.make()
    optimizer = CurveBall(model.parameters(), preconditioner=preconditioner)
    given = [
        (partial(model, x_i), partial(F.cross_entropy, target=y_i))
        for x_i, y_i in zip(x.chunk(parts), y.chunk(parts), strict=True)
    ]
    return lambda: optimizer.step(given if parts > 1 else given[0][0], None if parts > 1 else given[0][1])[0]


METHODS: dict[str, Callable[[Case, int], Callable[[], Tensor]]] = {
    "AdamW, fused": adamw,
    "CurveBall": partial(curveball, preconditioner=None),
    'CurveBall, "kronecker"': partial(curveball, preconditioner="kronecker"),
}


def main() -> None:
    torch.set_num_threads(1)
    case, method, parts = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if parts:
        step = METHODS[method](CASES[case], parts)
        for _ in range(3):
            step()
    print(peak_mib())


if __name__ == "__main__":
    main()
