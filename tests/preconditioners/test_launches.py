"""All but CPUs: what the metric launches for a net does not grow with the number of its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from curveball_fused import backends
from curveball_fused._torch_private import TorchDispatchMode, schema_of
from curveball_fused.backends.scalars import SCALARS
from curveball_fused.preconditioners import Preconditioner, blocks, fresh_state, refresh

LAYER = [(4, 6), (4,), (6, 4), (3, 2, 3), (40,)]  # two linear layers, one of them with its bias, and a convolution
ELSEWHERE = torch.device("meta")  # which is no CPU, and has no autocast
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "linalg_qr")


class Launches(TorchDispatchMode):
    """Counts the operators that would run something on a GPU: all but views and fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        shows = any(r.alias_info is not None and not r.alias_info.is_write for r in schema_of(func).returns)
        if not (shows or name.startswith(("empty", "_unsafe_view", "new_empty"))):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def launched(call: Callable[[], object]) -> Counter[str]:
    with Launches() as launches, torch.no_grad():
        call()
    return launches.names


@pytest.fixture(autouse=True)
def a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a GPU, whose own kernels take one launch for all tensors."""

    def precondition_(u: Sequence[Tensor], v: Sequence[Tensor], *_: Any) -> Tensor:
        return torch.ones(3, dtype=torch.float64, device=v[0].device)

    monkeypatch.setattr(backends, "preconditioner_kernels", lambda _: SimpleNamespace(precondition_=precondition_))
    monkeypatch.setattr(blocks, "LARGEST_BASIS", 4)  # sides of 6 have two pieces of 3


def learn(layers: int, with_z: bool) -> None:
    r = [torch.randn(shape) for _ in range(layers) for shape in LAYER]
    metric = Preconditioner(
        [fresh_state(r_i) for r_i in r], torch.ones(len(SCALARS), dtype=torch.float64), "torch", True
    )
    direction = metric.direction(r, r if with_z else None)
    metric.learn(direction, torch.ones(len(SCALARS), dtype=torch.float64))


def refresh_all(layers: int) -> None:
    states = [fresh_state(torch.zeros(shape, device=ELSEWHERE)) for _ in range(layers) for shape in LAYER]
    refresh(states, 0, torch.ones(len(SCALARS), dtype=torch.float64, device=ELSEWHERE))


@pytest.mark.parametrize("with_z", [False, True])
def test_direction_and_what_is_learned(with_z: bool) -> None:
    few, many = (launched(lambda n=n: learn(n, with_z)) for n in (2, 12))
    fresh = ("randn", "zeros", "fill_")  # of the test's own
    assert {k: n for k, n in many.items() if k not in fresh} == {k: n for k, n in few.items() if k not in fresh}
    matrices = 3
    products = sum(many[name] for name in PRODUCTS)
    assert products == 2 * matrices * (3 if with_z else 2) + 2 * matrices  # both sides, there and back; and the factors


def test_refreshes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    few, many = (launched(lambda n=n: refresh_all(n)) for n in (2, 12))
    fresh = ("zeros", "fill_")
    assert {k: n for k, n in many.items() if k not in fresh} == {k: n for k, n in few.items() if k not in fresh}
    stacks = 3  # sides of 4, of 3, and of 2 pieces of 3
    assert many["linalg_cholesky_ex"] == 2 * stacks and sum(many[name] for name in PRODUCTS) == 3 * stacks


def test_a_large_matrix_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curveball_fused.backends.reference.bases.LARGEST_STACKED", 3)
    few, many = (launched(lambda n=n: learn(n, False)) for n in (2, 12))
    assert many["stack"] == 1  # of norms
    assert sum(many[name] for name in PRODUCTS) == 6 * sum(few[name] for name in PRODUCTS)
