"""torch's operators with the samples that torch's own tests have for them, each as a model held against dense matrices.

Around a call of an operator stands `linear -> operator -> linear`: whatever tensor of a sample can have a gradient is
an affine function of a few parameters, and whatever result has one is mapped to a few numbers. A second way from the
parameters to those numbers goes past the operator, so that a tangent lost inside of it makes a wrong step and not none.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from curveball_fused import CurveBall, user_warnings
from curveball_fused.curvature import torch_modes
from curveball_fused.curvature.methods import AUTO
from curveball_fused.explanation.trace_report import trace
from tests.helpers.oracle import DenseCurveBall

FOLLOWED, REFUSED, WRONG, CRASHED = "followed", "refused", "wrong", "crashed"
STEPS = 3
PARAMETERS, OUTPUTS = 3, 4
SETTINGS: dict[str, Any] = dict(
    lr=0.7, lambd=2.0, lambda_factor=0.9, lambda_low=0.6, lambda_high=1.2, lambda_interval=2
)
# They return memory that was never written.
_WITHOUT_VALUES = frozenset(("empty_like", "new_empty", "new_empty_strided", "empty_permuted"))
_MOST_ELEMENTS = 20_000
# From the slowest way on the tape to the fastest.
_ON_THE_TAPE = ("double backward", "dual numbers")


@dataclass(frozen=True)
class Sample:
    """One call of an operator: `call` on the leaves of its arguments, some of which can depend on the parameters."""

    operator: str
    number: int
    call: Callable[[list[Any]], Any]
    leaves: list[Any]

    def __str__(self) -> str:
        shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return f"{self.operator}, sample {self.number}: {str(shapes)[:200]}"


@dataclass(frozen=True)
class Outcome:
    """What became of a few steps with an operator, and why."""

    sample: Sample
    kind: str
    reason: str = ""

    @property
    def named(self) -> bool:
        """Whether the reason names the operator, which need not be by the same name in all of torch."""
        name = self.sample.operator.rpartition(".")[2].strip("_")
        return name.replace("_", "") in self.reason.replace("_", "").replace(".", "")


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
        results = [t if isinstance(t, Tensor) and t.requires_grad else torch.empty(0) for t in self.results()]
        # By number, as a dual number does not say whether it requires a gradient.
        self.out = {
            i: random(OUTPUTS, real(t).numel()) / (1 + t.detach().abs().max()) / t.numel() ** 0.5
            for i, t in enumerate(results)
            if t.numel()
        }

    def results(self) -> list[Any]:
        leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in self.sample.leaves]
        for i, into in self.into.items():
            moved = (into @ self.theta).view(leaves[i].shape)
            leaves[i] = leaves[i] + (torch.complex(moved, -2 * moved) if leaves[i].is_complex() else moved)
        return tree_leaves(self.sample.call(leaves))

    def forward(self) -> Tensor:
        results = self.results()
        return sum((out @ real(results[i]) for i, out in self.out.items()), self.past @ self.theta)


def real(result: Tensor) -> Tensor:
    return torch.view_as_real(result.resolve_conj()).flatten() if result.is_complex() else result.flatten()


def operators() -> list[Any]:
    """Those of torch's operators that have a gradient in float64."""
    from torch.testing._internal.common_methods_invocations import op_db  # which takes ten seconds

    return [
        op
        for op in op_db
        if op.supports_autograd and op.supports_dtype(torch.float64, "cpu") and op.name not in _WITHOUT_VALUES
    ]


def samples(op: Any, most: int, in_place: bool = False) -> Iterator[Sample]:
    """Some of the samples of an operator, from the first to the last one."""
    function = op.inplace_variant if in_place else op.get_op()
    if function is None:
        return
    torch.manual_seed(0)
    given = list(op.sample_inputs("cpu", torch.float64, requires_grad=True))
    for number in sorted({round(i * (len(given) - 1) / max(1, most - 1)) for i in range(most)}):
        sample = given[number]
        leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        usual = all(t.layout == torch.strided and not t.is_nested for t in tensors)
        if not usual or not any(t.requires_grad and t.numel() for t in tensors):
            continue
        if (in_place and sample.broadcasts_input) or sum(t.numel() for t in tensors) > _MOST_ELEMENTS:
            continue

        def call(leaves: list[Any], spec: Any = spec, sample: Any = sample) -> Any:
            input, args, kwargs = tree_unflatten(leaves, spec)
            return sample.output_process_fn_grad(function(input, *args, **kwargs))

        constants = [
            leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        yield Sample(op.name + "_" * in_place, number, call, constants)


def model_of(sample: Sample) -> Around | None:
    """The model, or None where torch itself has no finite gradient for the sample."""
    torch.manual_seed(0)
    try:
        model = Around(sample)
        rows = [torch.autograd.grad(value, model.theta, retain_graph=True)[0] for value in model()]
    except (IndexError, NotImplementedError, RuntimeError, TypeError):
        return None
    return model if model.out and torch.stack(rows).isfinite().all() else None


def loss_of(out: Tensor) -> Tensor:
    return (out - torch.tensor([0.5, -1.0, 0.3, 2.0], dtype=out.dtype)).square().mean()


def outcome(sample: Sample, curvature: str = "auto") -> Outcome | None:
    """A few steps against dense matrices, up to where these are not finite; None where that is before the first."""
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
        try:
            loss, _ = truth.step(lambda net: net(), loss_of)
        except RuntimeError:  # a step has left the operator's domain
            break
        expected = torch.tensor([float(loss), truth.log[-1]["beta"], truth.log[-1]["rho"]])
        if not expected.isfinite().all():
            break
        torch.manual_seed(step)
        user_warnings.announced.clear()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step(model, loss_of)
        except Exception as error:
            refused = isinstance(error, RuntimeError) and "cannot follow this model" in str(error)
            return Outcome(sample, REFUSED if refused else CRASHED, f"{type(error).__name__}: {error}")
        got = torch.tensor([float(optimizer.stats()[key]) for key in ("loss", "beta", "rho")])
        if not torch.allclose(got, expected, rtol=1e-6, atol=1e-8):
            return Outcome(sample, WRONG, f"step {step}: loss, β, ρ {got.tolist()}, not {expected.tolist()}")
    return Outcome(sample, FOLLOWED)


def followed_by(sample: Sample) -> str:
    """How `curvature="auto"` follows an operator: by the name of the method, or of the slowest way on the tape."""
    for method in AUTO:
        found = outcome(sample, method)
        if found is not None and found.kind == FOLLOWED:
            break
    if method != AUTO[0]:
        return method
    model = model_of(sample)
    assert model is not None
    with warnings.catch_warnings(), torch_modes.force_eager():
        warnings.simplefilter("ignore")
        _, functions = trace(model, [model.theta])
    ways = [f.handled_by for f in functions]
    return next((way for way in _ON_THE_TAPE if way in ways), "own rule")
