"""What throughput is measured of: steps of first-order, Shampoo-like and CurveBall optimizers, on the same nets.

SOAP and the Muon of convolutions come from pytorch_optimizer, as in the study, and need not be installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks.nets import Case
from benchmarks.steps import PLAIN, Step, adamw, curveball, first_order, plain, sgd

PACKAGE = "pytorch_optimizer"
FROM_PACKAGE = "Muon", "SOAP"
ADAMW, KRONECKER = "AdamW", 'CurveBall, "kronecker"'


def hidden(net: nn.Module) -> list[nn.Parameter]:
    """Weights of linear, convolutional and recurrent layers but the last, which makes the outputs."""
    weights = [
        weight
        for module in net.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.RNNBase))
        for weight in module.parameters(recurse=False)
        if weight.ndim >= 2
    ]
    return weights[:-1]


def others(net: nn.Module, chosen: list[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that are not among the chosen ones."""
    ids = {id(p) for p in chosen}
    return [p for p in net.parameters() if id(p) not in ids]


def muon_and_adamw(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """The package's Muon for hidden matrices and convolutions, and AdamW for the others, in one."""
    chosen = hidden(net)
    groups: list[dict[str, Any]] = [{"params": others(net, chosen), "use_muon": False}]
    if chosen:
        groups.append({"params": chosen, "use_muon": True})
    optimizer: torch.optim.Optimizer = import_module(PACKAGE).Muon(groups, **options)
    return optimizer


def muon(net: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon beside AdamW: torch's for hidden matrices, or, where all are filters, which it refuses, the package's."""
    matrices = [p for p in hidden(net) if p.ndim == 2]
    if not matrices:
        return [muon_and_adamw(net)]
    return [torch.optim.Muon(matrices), torch.optim.AdamW(others(net, matrices), fused=True)]


def soap(net: nn.Module) -> list[torch.optim.Optimizer]:
    return [import_module(PACKAGE).SOAP(net.parameters())]


OPTIMIZERS: dict[str, Callable[[Case, int | None], Step]] = {
    "SGD": sgd,
    ADAMW: adamw,
    "Muon": lambda case, batch: first_order(case, muon, batch),
    "SOAP": lambda case, batch: first_order(case, soap, batch),
    PLAIN: plain,
    "CurveBall": curveball,
    KRONECKER: partial(curveball, preconditioner="kronecker"),
}
# Steps in a row that have the average cost: SOAP's bases are renewed in every tenth, λ is adapted in every fifth, and
# in the metric one of twenty solves. (There one in a hundred adapts λ too, which is left out: a third of a percent.)
STEPS_OF_A_TURN = dict.fromkeys(OPTIMIZERS, 5) | {"SOAP": 10, KRONECKER: 20}
WARM_UP = dict.fromkeys(OPTIMIZERS, 2) | {KRONECKER: 12}  # steps; among its first ten are more solves than later


def installed(case: Case, batch: int | None = None) -> dict[str, Step]:
    """Steps of all optimizers that are there for this net."""
    steps = {}
    for name, make in OPTIMIZERS.items():
        try:
            steps[name] = make(case, batch)
        except ModuleNotFoundError as missing:
            if missing.name != PACKAGE:
                raise
    return steps
