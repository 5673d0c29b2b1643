"""torch's operators with the samples that torch's own tests have for them, each as a model held against dense matrices.

Around a call of an operator stands `linear -> operator -> linear`: whatever tensor of a sample can have a gradient is an
affine function of a few parameters, and whatever result has one is mapped to a few numbers. A second way from the
parameters to those numbers goes past the operator, so that a tangent lost inside of it is a wrong step and not none.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from curveball_fused import CurveBall
from curveball_fused.curvature import torch_modes
from tests.helpers.oracle import DenseCurveBall

FOLLOWED, REFUSED, WRONG, CRASHED = "followed", "refused", "wrong", "crashed"
STEPS = 3
PARAMETERS, OUTPUTS = 3, 4
# The derivatives of these have poles or jumps at the samples, so that rounding decides what the truth is; or they
# return memory that was never written.
SKIPPED = frozenset(("empty_like", "new_empty", "new_empty_strided", "empty_permuted"))
SETTINGS: dict[str, Any] = dict(lr=0.7, lambd=2.0, lambda_factor=0.9, lambda_low=0.6, lambda_high=1.2, lambda_interval=2)


@dataclass(frozen=True)
class Sample:
    """One call of an operator: `call` on the leaves of its arguments, some of which depend on the parameters."""

    name: str
    number: int
    call: Callable[[list[Any]], Any]
    leaves: list[Any]

    def __str__(self) -> str:
        shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return f"{self.name}[{self.number}]{shapes}"


@dataclass(frozen=True)
class Outcome:
    """What three steps with an operator came to, and why."""

    sample: Sample
    kind: str
    reason: str = ""


class Around(nn.Module):
    """linear -> operator -> linear."""

    def __init__(self, sample: Sample) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(sample.number)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.sample = sample
        self.theta = nn.Parameter(0.3 * random(PARAMETERS))
        self.past = random(OUTPUTS, PARAMETERS)
        self.into = {
            i: 0.1 * random(leaf.numel(), PARAMETERS)
            for i, leaf in enumerate(sample.leaves)
            if isinstance(leaf, Tensor) and leaf.requires_grad
        }
        results = self.results()
        self.taken = [i for i, t in enumerate(results) if isinstance(t, Tensor) and t.requires_grad]
        sizes = [flat(results[i].detach()) for i in self.taken]
        self.out = [random(OUTPUTS, t.numel()) / (1 + t.abs().amax()) / t.numel() ** 0.5 for t in sizes if t.numel()]
        self.taken = [i for i, t in zip(self.taken, sizes) if t.numel()]

    def results(self) -> list[Any]:
        leaves = []
        for i, leaf in enumerate(self.sample.leaves):
            value = leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
            if i in self.into:
                moved = (self.into[i] @ self.theta).view(leaf.shape)
                value = value + (torch.complex(moved, moved.flip(0) if moved.dim() else moved) if leaf.is_complex() else moved)
            leaves.append(value)
        return tree_leaves(self.sample.call(leaves))

    def forward(self) -> Tensor:
        results = self.results()
        total = self.past @ self.theta
        for i, out in zip(self.taken, self.out):
            total = total + out @ flat(results[i])
        return total


def flat(result: Tensor) -> Tensor:
    return torch.view_as_real(result.resolve_conj()).flatten() if result.is_complex() else result.flatten()


def samples(op: Any, most: int | None = None, in_place: bool = False) -> Iterator[Sample]:
    """The samples of an operator in float64 for which autograd has a gradient."""
    function = op.inplace_variant if in_place else op.get_op()
    if function is None:
        return
    torch.manual_seed(0)
    for number, given in enumerate(islice(op.sample_inputs("cpu", torch.float64, requires_grad=True), most)):
        leaves, spec = tree_flatten((given.input, given.args, given.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not all(t.layout == torch.strided and t.device.type == "cpu" for t in tensors):
            continue
        if not any(t.requires_grad and t.numel() for t in tensors):
            continue

        def call(leaves: list[Any], spec: Any = spec, given: Any = given) -> Any:
            input, args, kwargs = torch.utils._pytree.tree_unflatten(leaves, spec)
            return given.output_process_fn_grad(function(input, *args, **kwargs))

        leaves = [
            leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        yield Sample(op.formatted_name + ("_" if in_place else ""), number, call, leaves)


def operators() -> list[Any]:
    return [
        op for op in op_db if op.supports_autograd and op.supports_dtype(torch.float64, "cpu") and op.name not in SKIPPED
    ]


def model_of(sample: Sample) -> Around | None:
    """The model, or None where autograd itself has no gradient for the sample."""
    try:
        torch.manual_seed(0)
        model = Around(sample)
        if not model.taken or any(t.layout != torch.strided for t in model.results() if isinstance(t, Tensor)):
            return None
        for value in model():
            torch.autograd.grad(value, model.theta, retain_graph=True)
        return model
    except (RuntimeError, NotImplementedError, IndexError, TypeError):
        return None


def loss_of(out: Tensor) -> Tensor:
    return (out - torch.tensor([0.5, -1.0, 0.3, 2.0], dtype=out.dtype)).square().mean()


def outcome(sample: Sample, curvature: str = "auto") -> Outcome | None:
    """Three steps against dense matrices; None where these are not finite."""
    model = model_of(sample)
    if model is None:
        return None
    truth = DenseCurveBall(
        copy.deepcopy(model), [["theta"]], [SETTINGS["lr"]], [0.0], SETTINGS["lambd"], SETTINGS["lambda_low"],
        SETTINGS["lambda_high"], SETTINGS["lambda_factor"], SETTINGS["lambda_interval"],
    )  # fmt: skip
    optimizer = CurveBall(model.parameters(), curvature=curvature, **SETTINGS)
    for step in range(STEPS):
        torch.manual_seed(step)
        loss, _ = truth.step(lambda net: net(), loss_of)
        expected = torch.tensor([float(loss), truth.log[-1]["beta"], truth.log[-1]["rho"]])
        if not expected.isfinite().all():
            return None if step == 0 else Outcome(sample, FOLLOWED)
        torch.manual_seed(step)
        torch_modes.announced.clear()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step(model, loss_of)
        except Exception as error:
            named = isinstance(error, RuntimeError) and "cannot follow this model" in str(error)
            return Outcome(sample, REFUSED if named else CRASHED, f"{type(error).__name__}: {error}")
        got = torch.tensor([float(optimizer.stats()[key]) for key in ("loss", "beta", "rho")])
        if not torch.allclose(got, expected, rtol=1e-6, atol=1e-8):
            return Outcome(sample, WRONG, f"step {step}: {got.tolist()} for {expected.tolist()}")
    return Outcome(sample, FOLLOWED)
