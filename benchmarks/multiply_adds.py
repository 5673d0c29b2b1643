"""Multiply-adds of a training step, counted by torch on real runs: what of its cost is arithmetic, not overhead.

Counted are matrix products, convolutions and attention. The other native operators of curveball_fused are elementwise
and count for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.nets import CASES
from benchmarks.steps import INTERVAL, STEPS
from curveball_fused.explanation.cost import FORMULAS

flop_registry.update(FORMULAS)  # torch lacks some
_BATCH = 2  # all counts are proportional to the batch


@dataclass(frozen=True)
class Counts:
    """Multiply-adds of a step, over those of a step of SGD.

    Attributes:
        methods: as counted, by method, with the update of λ in its turn.
        floor: the fewest that an exact step needs. A Jacobian-vector product multiplies once for each operand that has
            a tangent, as the backward pass does for each that needs a gradient, so of a forward pass F and an SGD
            step S the floor is one S, two products of S - F each, and F for every update of λ. It is 3 - 1.8 F/S: 2.4
            where S = 3 F, less where a first layer, whose input has neither tangent nor gradient, dominates.
    """

    methods: dict[str, float]
    floor: float


@functools.cache
def counts(name: str) -> Counts:
    """The counts of the network `CASES[name]`."""
    case = CASES[name]
    model, x, _ = case.make(_BATCH)
    with torch.no_grad():
        forward = _count(lambda: model(x))
    per_step = {}
    for method, make in STEPS.items():
        step = make(case, _BATCH)
        with_update, without = _count(step), _count(step)  # the first step adapts λ
        per_step[method] = (with_update + (INTERVAL - 1) * without) / INTERVAL
    sgd = per_step["SGD"]
    floor = sgd + 2 * (sgd - forward) + forward / INTERVAL
    return Counts({method: count / sgd for method, count in per_step.items()}, floor / sgd)


def _count(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2
