"""torch.compile around the optimizer: the step runs as it is, the parameter arithmetic is one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused import CurveBall, ops
from curveball_fused.backends.scalars import SCALARS
from tests.helpers.training import BACKENDS, SETTINGS, assert_equal, small

pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
]


def test_a_compiled_step_is_the_step() -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net, x, y = small()
        optimizer = CurveBall(net.parameters(), **SETTINGS)
        step = torch.compile(optimizer.step) if compiled else optimizer.step
        torch.manual_seed(1)
        for _ in range(5):
            loss, outputs = step(lambda: net(x), lambda out: F.cross_entropy(out, y))
        results.append([loss, outputs, *net.state_dict().values(), *optimizer.history().values()])
    assert_equal(*results)


def arithmetic(w: list[Tensor], z: list[Tensor], r: list[Tensor], scalars: Tensor, lr: Any, backend: str) -> Tensor:
    products = scalars.new_ones(5) * ops.dots(z, r, backend=backend)[2]
    scalars = ops.solve(scalars, scalars[3], products, lr=lr, backend=backend)
    rates, decays = [lr, 0.5], [0.1, 0.02]
    scalars = ops.update_groups_(w, z, r, scalars, group_sizes=[1, 1], lr=rates, weight_decay=decays, backend=backend)
    scalars = ops.adapt_damping(
        scalars, scalars[3], low=0.4, high=1.4, factor=0.9, minimum=1e-5, maximum=1e5, backend=backend
    )
    return ops.keep_coefficients(scalars, scalars[3], products[2], scalars[4], sign=-1.0, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lr", [0.8, torch.tensor(0.8)], ids=["number", "tensor"])
def test_the_parameter_arithmetic_is_one_graph(backend: str, lr: Any) -> None:
    results = []
    for function in (arithmetic, torch.compile(arithmetic, backend="aot_eager", fullgraph=True)):
        torch._dynamo.reset()
        torch.manual_seed(3)
        w, z, r = ([torch.randn(7, 5), torch.randn(13)] for _ in range(3))
        scalars = torch.zeros(len(SCALARS), dtype=torch.float64)
        scalars[2:4] = torch.tensor([0.7, 1.3])
        results.append([function(w, z, r, scalars, lr, backend), *w, *z])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
