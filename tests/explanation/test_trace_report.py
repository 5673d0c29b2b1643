"""What an observer sees of a tape, and that the tape goes on where it would refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused.curvature.tangent_maps import TapeUnsupported
from curveball_fused.curvature.tape import Tape
from curveball_fused.explanation.trace_report import trace
from tests.helpers.traceable_models import Double

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Log:
    """Keeps what it sees."""

    def __init__(self) -> None:
        self.events: list[tuple[str, ...]] = []

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.events.append(("call", func.__name__))

    def on_handled(self, func: Any, by: str) -> None:
        self.events.append((by, func.__name__))

    def on_refused(self, func: Any, reason: str) -> None:
        self.events.append(("refused", func.__name__, reason))

    def on_unknown(self, tensor: Tensor, reason: str) -> None:
        self.events.append(("unknown", type(tensor.grad_fn).__name__, reason))


def model(net: nn.Linear) -> Tensor:
    h = F.dropout1d(net(X), 0.5, training=False)  # composed of `feature_dropout`, which has no rule, and others
    h = h.clone().mul_(2.0).mul_(h)  # the second time by what requires a gradient
    return Double.apply(h.sinc()) + 1


def test_events_in_order() -> None:
    net, log = nn.Linear(6, 6), Log()
    with Tape(list(net.parameters()), "auto", log):
        outputs = model(net)
    calls = [name for kind, name, *_ in log.events if kind == "call"]
    outcomes = [event for event in log.events if event[0] != "call"]
    assert ("own rule", "linear") in outcomes and ("in-place rule", "mul_") in outcomes
    assert ("dual numbers", "sinc") in outcomes and ("composite", "dropout1d") in outcomes
    assert ("refused", "mul_", "mul_ writes to its argument") in outcomes
    assert [event[:2] for event in outcomes if event[0] == "unknown"] == [("unknown", "DoubleBackward")]
    handled = [event[1] for event in outcomes if event[0] != "unknown"]
    assert handled == calls and len(calls) == len(set(calls)) + 1  # mul_ twice
    torch.testing.assert_close(outputs, model(net))  # each call was made once


def test_a_tape_that_went_on_has_no_products() -> None:
    net = nn.Linear(6, 6)
    params, tangents = list(net.parameters()), [torch.ones_like(p) for p in net.parameters()]
    tape = Tape(params, "auto", Log())
    with tape:
        outputs = model(net)
    with pytest.raises(TapeUnsupported, match="cannot see into"):
        tape.jvp(tangents, outputs)


def test_calls_are_counted_by_outcome() -> None:
    net = nn.Linear(6, 6)
    _, functions = trace(lambda: model(net), list(net.parameters()))
    counts = {(f.name.rpartition(".")[2], f.handled_by): f.calls for f in functions}
    assert counts["mul_", "in-place rule"] == counts["mul_", "refused"] == 1
    assert counts["DoubleBackward", "refused"] == 1
    _, functions = trace(lambda: net(net(X)).tanh(), list(net.parameters()))
    assert [(f.name.rpartition(".")[2], f.handled_by, f.calls) for f in functions] == [
        ("linear", "own rule", 2),
        ("tanh", "own rule", 1),
    ]
