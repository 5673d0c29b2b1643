"""Jacobian products: the two identities that the method rests on, and what becomes of awkward models."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from curveball_fused.curvature.dual_numbers import DualNumbers
from tests.helpers import nets
from tests.helpers.jacobians import MODES, dot, linearized, products


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(nets.NETS))
def test_adjoint_identities(name: str, mode: Any) -> None:
    """z·Jᵀu = Jz·u and |Jᵀu|² = J Jᵀu·u: without them, no dot product could be taken in the output space."""
    _, jz, r, jr, z, u = products(mode, *nets.make(name))
    torch.testing.assert_close(dot(z, r), (jz * u).sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dot(r, r), (jr * u).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(nets.NETS))
def test_modes_agree(name: str) -> None:
    expected, *others = (products(mode, *nets.make(name)) for mode in MODES)
    for ours in others:
        for a, b in zip((*ours[:2], *ours[2], ours[3]), (*expected[:2], *expected[2], expected[3]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_no_grad_inside_the_model_stops_both_products() -> None:
    first, second = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)

    def model() -> Tensor:
        with torch.no_grad():
            features = first(x)
        return second(torch.tanh(features + first(x).detach()))

    params = [*first.parameters(), *second.parameters()]
    z = [torch.randn_like(p) for p in params]
    map_ = linearized(DualNumbers, model, params)
    _, jz = map_.jvp(z)
    u = torch.randn_like(jz)
    r = map_.vjp(u)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in r[:2])
    torch.testing.assert_close(dot(z, r), (jz * u).sum(), rtol=1e-12, atol=1e-12)


def test_a_model_that_differentiates_inside() -> None:
    """Physics-informed nets and energy models call torch.autograd.grad in their forward pass."""
    t = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None].requires_grad_()
    results = []
    for curvature in ("forward", "double_backward"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()

        def model(net: nn.Module = net) -> Tensor:
            u = net(t) + t**2
            (du,) = torch.autograd.grad(u.sum(), t, create_graph=True)
            return du + u

        optimizer = CurveBall(net.parameters(), curvature=curvature, lambda_interval=1)
        for _ in range(3):
            optimizer.step(model, lambda out: out.square().mean())
        results.append(torch.stack(list(optimizer.stats().values())))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:curveball_fused")
def test_a_view_made_before_the_step() -> None:
    """Its tangent is known to double backward alone."""
    stats = []
    for curvature, outside in (("auto", True), ("auto", False), ("forward", True)):
        torch.manual_seed(0)
        weight, layer = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 3)
        view = weight.t()
        optimizer = CurveBall([weight, *layer.parameters()], curvature=curvature)

        def model(weight: Any = weight, layer: Any = layer, view: Any = view, outside: bool = outside) -> Tensor:
            return layer(torch.eye(3)) @ weight @ (view if outside else weight.t())

        if curvature == "forward":
            with pytest.raises(RuntimeError, match="view of a parameter"):
                optimizer.step(model, lambda out: out.square().mean())
        else:
            for _ in range(2):
                optimizer.step(model, lambda out: out.square().mean())
            stats.append(torch.stack([optimizer.stats()[key] for key in ("loss", "beta", "rho")]))
    torch.testing.assert_close(*stats, rtol=1e-5, atol=0)


def test_functorch_inside_the_model() -> None:
    layer, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    one_step_equals_double_backward(
        lambda: (copy.deepcopy(layer), lambda model: torch.func.vmap(lambda row: torch.tanh(model(row)))(x))
    )


def one_step_equals_double_backward(
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]],
) -> list[str]:
    """Two steps by "auto" against two steps by double backward; returns what was announced."""
    stats, messages = [], []
    for curvature in ("auto", "double_backward"):
        torch.manual_seed(0)
        model, run = make()
        optimizer = CurveBall(model.parameters(), curvature=curvature)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                torch.manual_seed(1)
                optimizer.step(lambda model=model, run=run: run(model), lambda out: out.square().mean())
        messages.append([str(w.message) for w in caught if "curveball_fused" in str(w.message)])
        stats.append(torch.stack([v for k, v in optimizer.stats().items() if k != "ratio"]))
    torch.testing.assert_close(stats[0], stats[1], rtol=1e-8, atol=1e-8)
    return messages[0]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers(kind: Any, p: float) -> None:
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    messages = one_step_equals_double_backward(
        lambda: (kind(3, 5, num_layers=2, dropout=p).double(), lambda model: model(x)[0])
    )
    # Without dropout nothing is lost; with it the fused kernel would draw masks that nothing else knows.
    assert not messages if p == 0 else any("draws random numbers" in message for message in messages)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_transformer_layer(p: float) -> None:
    x = torch.randn(4, 2, 8, dtype=torch.float64)
    one_step_equals_double_backward(
        lambda: (nn.TransformerEncoderLayer(8, 2, 16, dropout=p).double(), lambda model: model(x))
    )


def test_attention_with_dropout() -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64)

    def run(layer: nn.Module) -> Tensor:
        q, k, v = layer(x).unflatten(2, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)

    one_step_equals_double_backward(lambda: (nn.Linear(6, 18).double(), run))


class Scale(torch.autograd.Function):
    """A custom function without a forward-mode formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum(0)


class Custom(nn.Module):
    def __init__(self, linear_first: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.weight = nn.Parameter(torch.randn(3))
        self.linear_first = linear_first

    def forward(self, x: Tensor) -> Tensor:
        return (
            Scale.apply(self.linear(x), self.weight) if self.linear_first else self.linear(Scale.apply(x, self.weight))
        )


@pytest.mark.parametrize("linear_first", [True, False])
def test_fallback_to_double_backward_is_announced(linear_first: bool) -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    messages = one_step_equals_double_backward(lambda: (Custom(linear_first).double(), lambda model: model(x)))
    assert len(messages) == 1 and "double backward" in messages[0] and "Function" in messages[0]


def test_forward_by_name_does_not_fall_back() -> None:
    model, x = Custom(True), torch.randn(4, 3)
    optimizer = CurveBall(model.parameters(), curvature="forward")
    with pytest.raises(RuntimeError, match='curvature="auto"'):
        optimizer.step(lambda: model(x), lambda out: out.square().mean())


@pytest.mark.filterwarnings("ignore:curveball_fused")
def test_a_checkpoint_does_not_choose_the_curvature_that_was_named() -> None:
    x = torch.randn(4, 3)
    model = Custom(True)
    optimizer = CurveBall(model.parameters())
    optimizer.step(lambda: model(x), lambda out: out.square().mean())
    named = CurveBall(model.parameters(), curvature="forward")
    named.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match='curvature="forward" cannot'):
        named.step(lambda: model(x), lambda out: out.square().mean())


class Opaque(torch.autograd.Function):
    """Neither a forward-mode formula nor a differentiable backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.filterwarnings("ignore:curveball_fused")
def test_nothing_left_to_fall_back_to() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match=r'"forward" cannot.*"double_backward" cannot'):
        CurveBall(layer.parameters()).step(lambda: Opaque.apply(layer(torch.ones(2, 3))), lambda out: out.mean())


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
@pytest.mark.parametrize("curvature", ["linearize", "forward"])
def test_scripted_module_is_refused(curvature: str) -> None:
    inner, outer = nn.Linear(3, 3), nn.Linear(3, 2)
    scripted = torch.jit.script(inner)
    optimizer = CurveBall([*outer.parameters(), *inner.parameters()], curvature=curvature)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(RuntimeError, match=r"tangent of a parameter was lost|cannot see into"):
        optimizer.step(lambda: outer(scripted(torch.ones(2, 3))), lambda out: out.square().mean())
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
def test_reading_a_dtype_is_not_using_a_parameter() -> None:
    inner, outer = nn.Linear(3, 3), nn.Linear(3, 2)
    scripted = torch.jit.script(inner)
    optimizer = CurveBall([*outer.parameters(), *inner.parameters()], curvature="forward")

    def model() -> Tensor:
        weight = inner.weight
        assert weight.requires_grad and weight.size(0) == 3 and weight.dim() == 2 and weight.numel() == 9
        return outer(scripted(torch.ones(2, 3, dtype=weight.dtype) + inner.bias.shape[0]))

    with pytest.raises(RuntimeError, match="tangent of a parameter was lost"):
        optimizer.step(model, lambda out: out.square().mean())


def test_compiled_module_runs_as_written() -> None:
    stats = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)), torch.randn(5, 3)
        module = torch.compile(model, backend="eager") if compiled else model
        optimizer = CurveBall(model.parameters())
        for _ in range(3):
            optimizer.step(lambda module=module, x=x: module(x), lambda out: out.square().mean())
        stats.append(torch.stack(list(optimizer.stats().values())))
    assert torch.equal(*stats)
