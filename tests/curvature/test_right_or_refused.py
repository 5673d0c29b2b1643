"""What people's models do to a derivative: by every method the dense truth, or a refusal that says what is wrong."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curveball_fused import CurveBall
from tests.helpers.oracle import DenseCurveBall

torch.manual_seed(0)
X, Y = torch.randn(24, 6, dtype=torch.float64), torch.randint(0, 3, (24,))
OPTIONS: dict[str, Any] = dict(lambd=0.7, lambda_interval=2, lambda_factor=0.9, lr=0.8, weight_decay=0.05)
METHODS = ("auto", "linearize", "forward", "double_backward")


def cross_entropy(out: Tensor) -> Tensor:
    return F.cross_entropy(out, Y)


def square(out: Tensor) -> Tensor:
    return (out - 0.3).square().mean()


class Mlp(nn.Module):
    def __init__(self, between: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.between = between or torch.mul

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.between(self.first(x), self.scale)))


class Raw(torch.autograd.Function):
    """An adjoint solver, or a fused kernel: its backward pass leaves no graph."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(a, w)
        return a * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        a, w = ctx.saved_tensors
        with torch.no_grad():
            return g * w, (g * a).sum(0)


class OnceDifferentiable(Raw):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        a, w = ctx.saved_tensors
        return g * w, (g * a).sum(0)


class Reversible(torch.autograd.Function):
    """A block that computes its activations again in the backward pass, whose gradients it leaves in `.grad`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, block: nn.Module) -> Tensor:
        ctx.a, ctx.block = a.detach(), block
        with torch.no_grad():
            return a + block(a)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        a = ctx.a.clone().requires_grad_()
        with torch.enable_grad():
            out = a + ctx.block(a)
        torch.autograd.backward(out, g.detach())
        return a.grad, None


class WithReversible(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Reversible.apply(self.scale * self.first(x), self.block))


def func_grad(net: nn.Module) -> Tensor:
    """A derivative by torch.func.grad of a function of the parameters, beside their direct use: u' + u."""
    params, t = dict(net.named_parameters()), X[:, 0]
    value = lambda p, s: torch.func.functional_call(net, p, (s.expand(6),)).sum()  # noqa: E731
    slope = torch.func.vmap(torch.func.grad(value, argnums=1), in_dims=(None, 0))(params, t)
    return net(X) + slope[:, None]


def func_vjp(net: nn.Module) -> Tensor:
    params = dict(net.named_parameters())
    _, pull = torch.func.vjp(lambda p: torch.func.functional_call(net, p, (X,)).square().mean(), params)
    gradient = pull(torch.ones((), dtype=X.dtype))[0]
    return net(X) * (1 + gradient["first.weight"].square().sum())


def func_jacrev(net: nn.Module) -> Tensor:
    params = dict(net.named_parameters())
    rows = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (X,)).square().mean(0))(params)
    return net(X) * rows["last.bias"].diagonal()


def maml_by_func(net: nn.Module) -> Tensor:
    params = dict(net.named_parameters())
    inner = lambda p: cross_entropy(torch.func.functional_call(net, p, (X,)))  # noqa: E731
    gradients = torch.func.grad(inner)(params)
    return torch.func.functional_call(net, {k: p - 0.5 * gradients[k] for k, p in params.items()}, (X,))


def maml_by_autograd(net: nn.Module) -> Tensor:
    params = dict(net.named_parameters())
    gradients = torch.autograd.grad(cross_entropy(net(X)), list(params.values()), create_graph=True)
    moved = {k: p - 0.5 * g for (k, p), g in zip(params.items(), gradients, strict=True)}
    return torch.func.functional_call(net, moved, (X,))


def gradient_norm(net: nn.Module) -> Tensor:
    gradients = torch.autograd.grad(cross_entropy(net(X)), list(net.parameters()), create_graph=True)
    return net(X) * (1 + sum(g.square().sum() for g in gradients))


def functional_jacobian(net: nn.Module) -> Tensor:
    """Zero of what does not require a gradient, as dual numbers do not: another function."""
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x).sum(0), X, create_graph=True)
    return net(X) + jacobian.square().sum((1, 2))


def asks_for_requires_grad(net: nn.Module) -> Tensor:
    hidden = checkpoint(net.first, X, use_reentrant=False)
    return net.last(torch.tanh(hidden)) if hidden.requires_grad else 3 * net.last(hidden)


def ensemble(net: nn.Module) -> Tensor:
    params = {name: torch.stack((p, 0.5 * p)) for name, p in net.named_parameters()}
    return torch.func.vmap(lambda p: torch.func.functional_call(net, p, (X,)))(params).mean(0)


ADJACENCY = (torch.rand(24, 24) < 0.2).double().to_sparse()


def sparse_vector_products(net: nn.Module) -> Tensor:
    return torch.stack([ADJACENCY.mv(column) for column in net(X).T], 1)


def forces(net: nn.Module) -> Tensor:
    """Of a net with group norm: torch's dual numbers of the zero direction are 1e-17, not zero."""
    position = X[:5].clone().requires_grad_()
    energy = -net(F.group_norm(position, 2)).square().sum()
    return torch.autograd.grad(energy, position, create_graph=True)[0]


ANY = "(?s)."  # whether it can be followed does not matter here


class Case(NamedTuple):
    """What is run, and, for the methods that refuse it, a word of why."""

    forward: Callable[[nn.Module], Tensor]
    refused: Mapping[str, str] = MappingProxyType({})
    make: Callable[[], nn.Module] = Mlp
    loss: Callable[[Tensor], Tensor] = cross_entropy


def plain(net: nn.Module) -> Tensor:
    return net(X)


def residual_of(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, w: a + function(a, w)


NO_GRAPH = "cannot see into|inside its forward|forward|transpose"
EVERY = dict.fromkeys(("auto", "double_backward"), "Raw") | dict.fromkeys(("linearize", "forward"), NO_GRAPH)
CASES = {
    "plain": Case(plain),
    "gradient without graph": Case(plain, EVERY, lambda: Mlp(Raw.apply)),
    "gradient without graph, residual": Case(plain, EVERY, lambda: Mlp(residual_of(Raw.apply))),
    "once differentiable": Case(
        plain,
        EVERY | dict.fromkeys(("auto", "double_backward"), "once|OnceDiff"),
        lambda: Mlp(OnceDifferentiable.apply),
    ),
    "nested backward": Case(
        plain, dict.fromkeys(METHODS, r"\.backward\(\)|see into|inside its forward"), WithReversible
    ),
    "torch.func.grad": Case(func_grad, {"linearize": ANY, "forward": "transpose"}, loss=square),
    "torch.func.vjp": Case(func_vjp, {"linearize": ANY, "forward": "transpose"}),
    "torch.func.jacrev": Case(func_jacrev, {"linearize": ANY, "forward": "transpose|function"}),
    "MAML by torch.func": Case(maml_by_func, {"linearize": ANY, "forward": "transpose"}),
    "MAML by autograd.grad": Case(maml_by_autograd, {"linearize": ANY, "forward": "does not require grad"}),
    "norm of the gradient": Case(gradient_norm, {"linearize": ANY, "forward": "does not require grad"}),
    "autograd.functional.jacobian": Case(functional_jacobian, {"linearize": ANY, "forward": ANY}),
    "asks for requires_grad": Case(
        asks_for_requires_grad, {"linearize": "checkpoint", "forward": "not one function|transpose"}
    ),
    "ensemble by vmap": Case(ensemble, {"linearize": ANY, "forward": ANY}),
    "sparse matrix times vectors": Case(sparse_vector_products, {"forward": "zerotensor"}),
    "forces": Case(forces, {"linearize": ANY}, loss=square),
}


@pytest.mark.filterwarnings("ignore:curveball_fused")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_right_or_refused(name: str, method: str) -> None:
    """Three steps equal those with explicit matrices; or an error, and weights, `.grad` and settings are untouched."""
    case = CASES[name]
    torch.manual_seed(1)
    net = case.make().double()
    truth = DenseCurveBall(
        copy.deepcopy(net),
        [[n for n, _ in net.named_parameters()]],
        [OPTIONS["lr"]],
        [OPTIONS["weight_decay"]],
        OPTIONS["lambd"],
        0.5,
        1.5,
        OPTIONS["lambda_factor"],
        OPTIONS["lambda_interval"],
    )
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = CurveBall(net.parameters(), curvature=method, **OPTIONS)
    step = lambda: optimizer.step(lambda: case.forward(net), case.loss)  # noqa: E731
    try:
        step()
    except RuntimeError as error:
        assert method in case.refused, error
        message = str(error)
        with pytest.raises(RuntimeError, match=case.refused[method]):
            raise
        assert "cannot follow this model" in message
        assert all(torch.equal(p, b) and p.grad is None for p, b in zip(net.parameters(), before, strict=True))
        return
    assert case.refused.get(method, ANY) == ANY, "it was to be refused"
    for i in range(3):
        with torch.enable_grad():  # some differentiate themselves, in the run at the new weights too
            loss, _ = truth.step(torch.enable_grad()(case.forward), case.loss)
        if i:
            step()
        stats = {k: float(v) for k, v in optimizer.stats().items()}
        for key, value in {**truth.log[-1], "loss": float(loss)}.items():
            assert stats[key] == pytest.approx(value, rel=1e-7, abs=1e-12), (i, key)
    assert stats["adjoint_error"] < 1e-12


@pytest.mark.parametrize("method", ["auto", "double_backward"])
@pytest.mark.parametrize("function", [Raw, OnceDifferentiable])
def test_what_the_first_step_multiplies_by_zero_is_refused_too(function: type[Raw], method: str) -> None:
    """A branch that begins at zero: the first step would be right, and the second wrong."""
    net = Mlp(function.apply).double()
    nn.init.zeros_(net.last.weight)
    with pytest.raises(RuntimeError, match=f"autograd.Function {function.__name__} cannot be differentiated"):
        CurveBall(net.parameters(), curvature=method).step(lambda: net(X), cross_entropy)


def test_the_reasons_of_all_methods_are_told() -> None:
    net = Mlp(Raw.apply).double()
    with pytest.raises(RuntimeError) as caught:
        CurveBall(net.parameters()).step(lambda: net(X), cross_entropy)
    assert all(f'"{method}" cannot follow' in str(caught.value) for method in METHODS[1:])


def test_an_error_of_the_model_is_raised_as_it_is() -> None:
    class Own(Exception):
        pass

    def model() -> Tensor:
        raise Own("mine")

    net, calls = nn.Linear(6, 3).double(), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Own, match="mine"):
            CurveBall(net.parameters()).step(model, cross_entropy)
        with pytest.raises(RuntimeError, match=r"mat1 and mat2|shapes"):
            CurveBall(net.parameters()).step(lambda: calls.append(0) or net(X.T), cross_entropy)
    assert len(calls) == 2  # once by a method, once to see whose fault it is


def test_a_lack_of_memory_is_no_reason_to_try_another_method() -> None:
    net, calls = nn.Linear(6, 3).double(), []

    def model() -> Tensor:
        calls.append(0)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        CurveBall(net.parameters()).step(model, cross_entropy)
    assert len(calls) == 1
