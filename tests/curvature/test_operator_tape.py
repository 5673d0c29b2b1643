"""The tape of operators: gradients that a model takes of its own results, against the Jacobian row by row."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.autograd.functional import hessian, hvp, jacobian
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint

from curveball_fused import CurveBall
from curveball_fused.curvature.linearized import Linearized, LinearizedOperators
from curveball_fused.curvature.tangent_maps import TapeUnsupported
from curveball_fused.curvature.torch_modes import ForwardModeUnsupported
from tests.helpers.jacobians import linearized

DOUBLE = torch.float64
X = torch.randn(6, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
IMAGES = torch.randn(3, 2, 6, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
Model = Callable[[Any], Tensor]
Make = Callable[[], nn.Module]
MODELS: dict[str, tuple[Make, Model]] = {}


def mlp(outputs: int = 3, activation: Callable[[], nn.Module] = nn.Tanh, inputs: int = 2) -> Make:
    return lambda: nn.Sequential(
        nn.Linear(inputs, 5), activation(), nn.Linear(5, 5), activation(), nn.Linear(5, outputs)
    )


def model(make: Make) -> Callable[[Model], Model]:
    def decorator(run: Model) -> Model:
        MODELS[run.__name__] = make, run
        return run

    return decorator


def coordinates() -> Tensor:
    return X.clone().requires_grad_()


def laplacian(net: Any) -> Tensor:
    """And the net itself, on the same coordinates and on others, as in a boundary term."""
    x = coordinates()
    u = net(x)
    (g,) = grad(u.sum(), x, create_graph=True)
    second = [grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
    return torch.cat([second[0] + second[1] + u[:, 0] * x[:, 1], 3 * net(X + 1)[:, 0]])


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(3 * x)


class Residual(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.last, self.norm = nn.Linear(2, 6), nn.Linear(6, 6), nn.Linear(6, 1), norm

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + F.gelu(self.norm(self.second(h))))


MODELS |= {
    f"laplacian, {activation.__name__}": (mlp(1, activation), laplacian)
    for activation in (
        nn.Tanh, Sine, nn.SiLU, nn.GELU, nn.Softplus, nn.Sigmoid, nn.ELU, nn.Mish, nn.ReLU, nn.LeakyReLU, nn.LogSigmoid,
        nn.Hardswish, nn.Softsign, nn.ReLU6, nn.CELU,
    )
}  # fmt: skip
MODELS |= {
    f"laplacian, {name}": (lambda norm=norm: Residual(norm()), laplacian)
    for name, norm in {
        "layer norm": lambda: nn.LayerNorm(6),
        "RMS norm": lambda: nn.RMSNorm(6),
        "group norm": lambda: nn.GroupNorm(2, 6),
        "batch norm": lambda: nn.BatchNorm1d(6),
        "batch norm, evaluated": lambda: nn.BatchNorm1d(6).eval(),
        "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
    }.items()
}


@model(mlp(1, nn.SiLU))
def wave_equation(net: Any) -> Tensor:
    x, t = (X[:, i : i + 1].clone().requires_grad_() for i in range(2))
    u = net(torch.cat([x, t], 1))
    ux, ut = grad(u.sum(), (x, t), create_graph=True)
    return grad(ut.sum(), t, create_graph=True)[0] - 4 * grad(ux.sum(), x, create_graph=True)[0] + x * u


@model(mlp(1, inputs=4))
def burgers_with_fourier_features(net: Any) -> Tensor:
    x = coordinates()
    u = net(torch.cat([torch.sin(2 * x), torch.cos(x @ X[:2])], 1))
    (g,) = grad(u, x, torch.ones_like(u), create_graph=True)
    (second,) = grad(g[:, 0], x, torch.ones_like(g[:, 0]), create_graph=True)
    return g[:, 1:] + u * g[:, :1] - 0.01 * second[:, :1]


@model(mlp(2))
def third_derivatives(net: Any) -> Tensor:
    x = coordinates()
    u = net(x).sum()
    for _ in range(3):
        (u,) = grad(u.sum(), x, create_graph=True)
    return u + net(x)


@model(mlp(1, inputs=2))
def forces_between_atoms(net: Any) -> Tensor:
    positions = torch.randn(5, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(2)).requires_grad_()
    i, j = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 3, 4, 0, 2])
    distance = (positions[i] - positions[j]).norm(dim=1, keepdim=True)
    messages = net(torch.cat([distance, distance.sin()], 1))
    energies = torch.zeros(5, 1, dtype=DOUBLE).index_add_(0, i, messages).tanh()
    energies = energies * torch.zeros(5, 1, dtype=DOUBLE).scatter_add(0, j[:, None], messages)
    return torch.cat([-grad(energies.sum(), positions, create_graph=True)[0].flatten(), energies[:, 0]])


@model(mlp(1, inputs=4))
def lagrangian(net: Any) -> Tensor:
    q = X.clone().requires_grad_()
    v = X.cos().requires_grad_()
    lv, lq = grad(net(torch.cat([q, v], 1)).sum(), (v, q), create_graph=True)
    mass = torch.stack([grad(lv[:, i].sum(), v, create_graph=True)[0] for i in range(2)], 1)
    mixed = torch.stack([grad(lv[:, i].sum(), q, create_graph=True)[0] for i in range(2)], 1)
    return torch.linalg.solve(mass + 3 * torch.eye(2, dtype=DOUBLE), lq - (mixed @ v[:, :, None])[:, :, 0])


@model(
    lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.LeakyReLU(0.2), nn.BatchNorm2d(3), nn.MaxPool2d(2),
        nn.ConvTranspose2d(3, 2, 2, stride=2), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(18, 1),
    )
)  # fmt: skip
def gradient_penalty(net: Any) -> Tensor:
    x = IMAGES.clone().requires_grad_()
    out = net(x)
    (g,) = grad(out, x, torch.ones_like(out), create_graph=True)
    return torch.cat([out[:, 0], (g.flatten(1).norm(2, dim=1) - 1) ** 2])


@model(mlp())
def gradient_norm(net: Any) -> Tensor:
    out = net(X)
    gradients = grad(F.cross_entropy(out, LABELS), net.parameters(), create_graph=True)
    return out * (1 + sum(g.square().sum() for g in gradients))


def adapted(net: Any, steps: int, **options: Any) -> Tensor:
    weights = {name: p.clone() for name, p in net.named_parameters()}
    for _ in range(steps):
        loss = F.cross_entropy(functional_call(net, weights, (X,)), LABELS)
        gradients = grad(loss, weights.values(), **options)
        weights = {name: w - 0.3 * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
    return functional_call(net, weights, (X + 1,))


MODELS |= {
    "MAML": (mlp(), lambda net: adapted(net, 1, create_graph=True)),
    "MAML, two steps": (mlp(3, nn.GELU), lambda net: adapted(net, 2, create_graph=True)),
    "MAML, first order": (mlp(3, nn.GELU), lambda net: adapted(net, 2, retain_graph=True)),
}


@model(mlp(2))
def options_of_grad(net: Any) -> Tensor:
    x, other = coordinates(), coordinates()
    u = net(x)
    a, none = grad(u.sum(), (x, other), create_graph=True, allow_unused=True)
    assert none is None
    b, zero = grad(u, (x, other), net(X + 1), create_graph=True, allow_unused=True, materialize_grads=True)
    every = torch.eye(2, dtype=DOUBLE)[:, None].expand(2, 6, 2)
    (rows,) = grad(u, x, every, create_graph=True, is_grads_batched=True)
    with torch.no_grad():
        shift = a.sum()
    return a * b + zero + x * u + rows.sum(0) + shift + a.detach()


@model(mlp())
def constants_in_between(net: Any) -> Tensor:
    x = net(X)[:, :2].detach().requires_grad_()
    y = 2 * net(X)[:, :2]
    y.detach_().requires_grad_()
    samples = X
    for _ in range(2):
        samples = samples.detach().requires_grad_()
        samples = samples - 0.1 * grad(net(samples).square().sum(), samples)[0]
    gradient = grad(net(x).sum() + net(y).sin().sum(), (x, y), create_graph=True)
    return gradient[0] * x + gradient[1] * y + net(samples.detach())[:, :2]


@model(mlp())
def of_hidden_layers_and_views(net: Any) -> Tensor:
    h = net[1](net[0](X))
    (g,) = grad(F.cross_entropy(net[2:](h), LABELS), h, create_graph=True)
    view = h.t()[1:4]
    (of_view,) = grad(view.sin().sum(), view, create_graph=True)
    return net[2:](h - 0.5 * g) + of_view.t()[:, :3]


@model(mlp())
def in_place(net: Any) -> Tensor:
    x = coordinates()
    h = net(x).exp() + 1
    h.mul_(2).add_(h.detach())
    z = torch.zeros(6, 4, dtype=DOUBLE)
    z[:, 1:] = h
    z[0] = 3.0
    z.view(-1)[3:5].mul_(2)
    z[:, 1:3] += net(X)[:, :2]
    z[z > 0.2] *= 2
    columns = net(x).t().clone().t()
    columns[:, 1:2] = h[:, :1]
    return grad(z.square().sum() + columns.sin().sum(), x, create_graph=True)[0] + z[:, :2] * columns[:, 1:]


@model(mlp())
def operators_of_all_kinds(net: Any) -> Tensor:
    x = coordinates()
    h = net(x)
    near = torch.where(h > 0, h.exp(), h * 2) + h.clamp(-0.1, 0.2) + h.amax(1, keepdim=True) + h.abs() + h.floor()
    matrix = h.T @ h + torch.eye(3, dtype=DOUBLE)
    total = (
        near.square().sum()
        + torch.logdet(matrix)
        + torch.einsum("bi,ij,bj->b", h, net[0].weight[:3, :] @ X.T[:, :3], h).sum()
    )
    total = (
        total
        + F.normalize(h, dim=1).prod(1).sum()
        + h.std(1).sum()
        + h.sort(1)[0][:, 0].sum() / (2 + h.sigmoid().mean())
    )
    total = (
        total + torch.fft.rfft(h).abs().sum() + F.huber_loss(h, X[:, :1].expand(6, 3)) + F.mse_loss(h, h.detach() + 1)
    )
    return grad(total, x, create_graph=True)[0]


@model(lambda: nn.ModuleList([nn.Embedding(5, 2, padding_idx=1), mlp()()]))
def embeddings(nets: Any) -> Tensor:
    e = nets[0](torch.tensor([0, 1, 2, 1]))
    energy = nets[1](e).square().sum()
    of_table = grad(energy, nets[0].weight, create_graph=True)[0]
    return torch.cat([grad(energy, e, create_graph=True)[0] + e, of_table])


@model(lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.3))
def attention_with_dropout(net: Any) -> Tensor:
    x = X.view(1, 3, 4).clone().requires_grad_()
    return grad(net(x).square().sum(), x, create_graph=True)[0]


@model(lambda: nn.GRU(2, 3, batch_first=True))
def recurrence(net: Any) -> Tensor:
    x = X.view(2, 3, 2).clone().requires_grad_()
    return grad(net(x)[0].square().sum(), x, create_graph=True)[0]


@model(mlp(2))
def functionals(net: Any) -> Tensor:
    j = jacobian(lambda w: F.linear(X, w).tanh().square().mean(0), net[0].weight, create_graph=True)
    h = hessian(lambda x: net(x).sum(), X[:2], create_graph=True)
    return net(X) * (1 + j.square().sum()) + h.sum() + hvp(lambda x: net(x).sum(), X, X.cos(), create_graph=True)[1]


@model(mlp(1))
def transforms_over_coordinates(net: Any) -> Tensor:
    value = lambda x: net(x).squeeze()  # noqa: E731
    trace = vmap(lambda x: torch.func.hessian(value)(x).trace())(X)
    tangent = torch.func.jvp(net, (X,), (X.cos(),))[1][:, 0]
    return trace + tangent * vmap(torch.func.jacrev(torch.func.grad(value)))(X).sum((1, 2))


@model(mlp(1))
def transforms_over_parameters(net: Any) -> Tensor:
    params = dict(net.named_parameters())
    value = lambda p, x: functional_call(net, p, (x,)).squeeze()  # noqa: E731
    _, pull = torch.func.vjp(lambda p: value(p, X).square().mean(), params)
    norm = pull(torch.ones((), dtype=DOUBLE))[0]["0.weight"].square().sum()
    return vmap(torch.func.grad(value, argnums=1), in_dims=(None, 0))(params, X) * norm + net(X)


@model(mlp(1))
def per_sample_gradients(net: Any) -> Tensor:
    params = dict(net.named_parameters())
    loss = lambda p, x: functional_call(net, p, (x[None],)).square().sum()  # noqa: E731
    gradients = vmap(torch.func.grad(loss), in_dims=(None, 0))(params, X)
    return torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()])


@model(lambda: nn.ModuleList([mlp()() for _ in range(3)]))
def ensemble(nets: Any) -> Tensor:
    own = [dict(net.named_parameters()) for net in nets]
    params = {name: torch.stack([p[name] for p in own]) for name in own[0]}
    return vmap(lambda p: functional_call(nets[0], p, (X,)))(params).flatten(0, 1)


@model(mlp())
def dual_numbers_in_the_model(net: Any) -> Tensor:
    with fwAD.dual_level():
        tangent: Tensor = fwAD.unpack_dual(net(fwAD.make_dual(X, X.cos()))).tangent
        return tangent + net(X)


def products_and_truth(method: Any, net: nn.Module, run: Model) -> list[tuple[Tensor, Tensor]]:
    """Jv, Jᵀu and the J of that, each beside what the dense Jacobian gives."""
    params = list(net.parameters())
    torch.manual_seed(3)
    rows = []
    for value in (expected := run(net)).flatten():
        row = grad(value, params, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([(torch.zeros_like(p) if r is None else r).flatten() for p, r in zip(params, row)]))
    jacobian_matrix = torch.stack(rows).detach()
    v = [torch.cos(torch.arange(p.numel(), dtype=DOUBLE)).view(p.shape) for p in params]
    torch.manual_seed(3)
    linear = linearized(method, lambda: run(net), params)
    outputs, jv = linear.jvp(v)
    u = torch.sin(1 + torch.arange(outputs.numel(), dtype=DOUBLE)).view(outputs.shape)
    r = linear.vjp(u)
    flat = lambda tensors: torch.cat([t.flatten() for t in tensors])  # noqa: E731
    return [
        (outputs, expected.detach()),
        (jv.flatten(), jacobian_matrix @ flat(v)),
        (flat(r), jacobian_matrix.T @ u.flatten()),
        (linear.jvp(r)[1].flatten(), jacobian_matrix @ flat(r)),
    ]


@pytest.mark.parametrize("name", list(MODELS))
def test_products_are_those_of_the_dense_jacobian(name: str) -> None:
    make, run = MODELS[name]
    torch.manual_seed(1)
    for ours, truth in products_and_truth(LinearizedOperators, make().double(), run):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g * ctx.saved_tensors[0] ** 2


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


def hooked(net: Any) -> Tensor:
    h = net(X)
    h.register_hook(lambda g: 2 * g)
    return h.square()


def backward_inside(net: Any) -> Tensor:
    x = coordinates()
    net(x).square().sum().backward(create_graph=True)
    assert x.grad is not None
    return x.grad * 1


def frequencies(net: Any) -> Tensor:
    return F.embedding(torch.tensor([0, 1, 1]), net[0].weight, scale_grad_by_freq=True)


def gradient_of(function: Callable[[Tensor], Tensor]) -> Model:
    def run(net: Any) -> Tensor:
        x = coordinates()
        return grad(function(net(x)).sum(), x, create_graph=True)[0]

    return run


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (gradient_of(Cube.apply), "cannot be seen into"),
        (gradient_of(Reversed.apply), "cannot be seen into"),
        (lambda net: Reversed.apply(net(X)) + net(X), "cannot be seen into"),
        (gradient_of(lambda h: F.rrelu(h, training=True)), "rrelu"),
        (lambda net: checkpoint(net, X, use_reentrant=False), "checkpointing"),
        (hooked, "register_hook"),
        (backward_inside, "backward inside"),
        (frequencies, "scale_grad_by_freq"),
    ],
)
def test_what_it_cannot_follow_is_refused(run: Model, words: str) -> None:
    torch.manual_seed(1)
    net = mlp()().double()
    params = list(net.parameters())
    with pytest.raises((TapeUnsupported, ForwardModeUnsupported), match=words):
        linearized(LinearizedOperators, lambda: run(net), params).jvp([torch.ones_like(p) for p in params])


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (MODELS["transforms_over_parameters"][1], "torch.func"),
        (MODELS["ensemble"][1], "cannot see into|torch.func"),
        (laplacian, "grad inside"),
        (hooked, "register_hook"),
    ],
)
def test_the_tape_of_functions_refuses_what_is_out_of_its_sight(run: Model, words: str) -> None:
    torch.manual_seed(1)
    net = (nn.ModuleList([mlp()() for _ in range(3)]) if "see into" in words else mlp(1)()).double()
    params = list(net.parameters())
    with pytest.raises(TapeUnsupported, match=words):
        linearized(Linearized, lambda: run(net), params).jvp([torch.ones_like(p) for p in params])


def test_the_tape_of_functions_follows_gradients_that_are_constant() -> None:
    torch.manual_seed(1)
    make, run = MODELS["MAML, first order"]
    for ours, truth in products_and_truth(Linearized, make().double(), run):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)


def test_auto_takes_it_and_steps_as_by_double_backward() -> None:
    outcomes = []
    for curvature in ("auto", "double_backward"):
        torch.manual_seed(1)
        optimizer = CurveBall((net := mlp(1)().double()).parameters(), curvature=curvature, lambda_interval=1)
        for _ in range(3):
            optimizer.step(lambda net=net: laplacian(net), lambda out: out.square().mean())
        outcomes.append([p.detach() for p in net.parameters()])
    torch.testing.assert_close(*outcomes, rtol=1e-9, atol=1e-11)


def test_nothing_outlives_a_step() -> None:
    """Without the help of the garbage collector."""
    net = mlp(1)().double()
    optimizer = CurveBall(net.parameters(), curvature="linearize_operators")

    def tensors_after_a_step() -> int:
        optimizer.step(lambda: laplacian(net), lambda out: out.square().mean())
        return sum(isinstance(t, Tensor) for t in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        counts = [tensors_after_a_step() for _ in range(4)]
    finally:
        gc.enable()
    assert counts[1:] == counts[1:2] * 3
