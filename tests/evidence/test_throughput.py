"""What throughput is measured of: that each optimizer trains, and that the alternatives of an operator do its work."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from benchmarks import operators
from benchmarks.compare import compare
from benchmarks.nets import CASES, basic_bn, mlp
from benchmarks.optimizers import FROM_PACKAGE, OPTIMIZERS, PACKAGE, STEPS_OF_A_TURN, hidden, installed, muon

SMALL = 40  # elements of a tensor


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains(name: str) -> None:
    case = CASES["mlp"]
    steps = installed(case, 16)
    if name not in steps:
        pytest.skip(f"{PACKAGE} is not installed")
    losses = [float(steps[name]()) for _ in range(12)]
    assert losses[-1] < losses[0]


def test_only_those_of_the_package_may_be_missing() -> None:
    missing = OPTIMIZERS.keys() - installed(CASES["basic_bn"], 2).keys()
    assert missing == (set() if find_spec(PACKAGE) else set(FROM_PACKAGE))
    assert STEPS_OF_A_TURN.keys() == OPTIMIZERS.keys()


def test_muon_has_the_hidden_matrices() -> None:
    net = mlp()
    assert [tuple(p.shape) for p in hidden(net)] == [(256, 784), (256, 256)]
    ours, adamw = muon(net)
    assert isinstance(ours, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    of_both = [p for optimizer in (ours, adamw) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, of_both)) == sorted(map(id, net.parameters()))
    assert [p.ndim for p in hidden(basic_bn())] == [4] * 4


def test_alternatives_of_the_update_agree() -> None:
    makers = operators.PARAMETERS["update_"]
    results = []
    for name in ("ops.update_", "torch._foreach", "reference.update_"):
        flat = operators.vectors(SMALL)
        makers[name](flat)()
        results.append(flat[:2])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_alternatives_of_the_dots_agree() -> None:
    flat = operators.vectors(SMALL)
    one, *three = (make(flat)() for make in operators.PARAMETERS["dots"].values())
    for sums in three:
        assert isinstance(sums, Tensor)
        torch.testing.assert_close(sums.float(), three[0].float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sums[1].float(), one, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", operators.PARAMETERS["precondition_"])
def test_alternatives_of_the_preconditioner_run(name: str) -> None:
    flat = operators.vectors(SMALL)
    operators.PARAMETERS["precondition_"][name](flat)()
    assert all(vector.isfinite().all() for vector in flat)


@pytest.mark.parametrize("loss", operators.LOSSES)
def test_alternatives_of_a_loss_agree(loss: object) -> None:
    calls = operators.loss_calls(loss, 8, 5)
    assert tuple(calls) == operators.LOSS_CALLS
    torch.testing.assert_close(calls[operators.FUSED](), calls[operators.CLOSED_FORM]())


def test_units_may_differ_by_name() -> None:
    ran = dict.fromkeys("ab", 0)

    def call(name: str) -> None:
        ran[name] += 1

    timings = compare({name: lambda name=name: call(name) for name in ran}, "a", 2, 3, {"a": 1, "b": 10**9})
    assert ran == {"a": 6, "b": 6}
    assert timings["b"].ratio.median < 1e-3
