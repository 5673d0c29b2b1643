"""The operators that cross the parameters, and those of the losses, and what stands beside each in plain torch.

An alternative is a function of the tensors that returns the call to be timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused import ops
from curveball_fused.backends.reference import closed_form_losses
from curveball_fused.backends.reference import parameters as reference
from curveball_fused.backends.reference.closed_form_losses import Products
from curveball_fused.losses import fused as fused_losses

COUNT, SIZE = 64, 2**25 // 64
# β, ρ and λ by which the numbers stay in range however often the update is repeated.
BETA, RHO, LAMBD, LR = 1e-3, 0.9, 0.1, 1e-3

Call = Callable[[], object]
Vectors = tuple[Tensor, Tensor, Tensor, Tensor]  # w, z, r and an average of r², each of all parameters


def vectors(size: int = SIZE) -> Vectors:
    """Parameters, state and gradient as one vector each, of `COUNT` tensors."""
    torch.manual_seed(0)
    w, z, r = (torch.randn(COUNT * size) for _ in range(3))
    return w, z, r, r.square()


def split(vector: Tensor) -> list[Tensor]:
    return list(vector.chunk(COUNT))


def fused_sgd(flat: Vectors) -> Call:
    """A step of fused momentum SGD on these tensors: parameters, momentum buffers and gradients."""
    w, z, r, _ = map(split, flat)
    params = [torch.nn.Parameter(w_i) for w_i in w]
    optimizer = torch.optim.SGD(params, lr=1e-6, momentum=RHO, fused=True)
    for p, z_i, r_i in zip(params, z, r, strict=True):
        p.grad = r_i
        optimizer.state[p]["momentum_buffer"] = z_i
    return optimizer.step


def fused_adam(flat: Vectors) -> Call:
    """A step of fused Adam: parameters, averages of gradients and of their squares, and gradients."""
    w, z, r, v = map(split, flat)
    params = [torch.nn.Parameter(w_i) for w_i in w]
    optimizer = torch.optim.Adam(params, lr=1e-6, fused=True)
    for p, z_i, v_i, r_i in zip(params, z, v, r, strict=True):
        p.grad = r_i
        optimizer.state[p] |= {"step": torch.tensor(0.0), "exp_avg": z_i, "exp_avg_sq": v_i}
    return optimizer.step


def update(backend: str) -> Callable[[Vectors], Call]:
    def make(flat: Vectors) -> Call:
        w, z, r, _ = map(split, flat)
        coefficients = torch.tensor([BETA, RHO, LAMBD], dtype=torch.float64)
        return lambda: ops.update_(w, z, r, coefficients, lr=LR, backend=backend)

    return make


def foreach_update(flat: Vectors) -> Call:
    w, z, r, _ = map(split, flat)

    def call() -> Tensor:
        torch._foreach_mul_(z, RHO - BETA * LAMBD)
        torch._foreach_add_(z, r, alpha=-BETA)
        torch._foreach_add_(w, z, alpha=LR)
        return torch.stack(torch._foreach_norm(z)).square().sum()

    return call


def three_dots(flat: Vectors) -> Call:
    _, z, r, _ = map(split, flat)
    pairs = ((z, z), (z, r), (r, r))
    return lambda: torch.stack([torch.stack([a.dot(b) for a, b in zip(*p, strict=True)]).sum() for p in pairs])


def foreach_dots(flat: Vectors) -> Call:
    _, z, r, _ = map(split, flat)

    def call() -> Tensor:
        products = (torch._foreach_mul(a, b) for a, b in ((z, z), (z, r), (r, r)))
        return torch.stack([torch.stack([p.sum() for p in product]).sum() for product in products])

    return call


def dots(backend: str) -> Callable[[Vectors], Call]:
    def make(flat: Vectors) -> Call:
        _, z, r, _ = map(split, flat)
        return (lambda: reference.dots(z, r)) if backend == "torch" else (lambda: ops.dots(z, r, backend=backend))

    return make


def precondition(backend: str, v_stays: bool = False, with_z: bool = True) -> Callable[[Vectors], Call]:
    def make(flat: Vectors) -> Call:
        _, z, r, v = map(split, flat)
        weight, taken = torch.tensor(0.5, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        options: dict[str, Any] = {"scalars": None if v_stays else taken, "backend": backend}
        return lambda: ops.precondition_(v, r, z if with_z else None, weight, decay=0.999, eps=1e-8, **options)

    return make


# The first of each is what ours is judged by.
PARAMETERS: dict[str, dict[str, Callable[[Vectors], Call]]] = {
    "update_": {
        "torch.optim.SGD, fused": fused_sgd,
        "ops.update_": update("cpu"),
        "torch._foreach": foreach_update,
        "reference.update_": update("torch"),
    },
    "dots": {
        "torch.dot, one sum": lambda flat: lambda: torch.dot(flat[1], flat[2]),
        "ops.dots, three sums": dots("cpu"),
        "torch.dot per tensor, three sums": three_dots,
        "torch._foreach_mul, three sums": foreach_dots,
        "reference.dots, three sums": dots("torch"),
    },
    "precondition_": {
        "torch.optim.Adam, fused": fused_adam,
        "ops.precondition_": precondition("cpu"),
        "ops.precondition_, v stays": precondition("cpu", v_stays=True),
        "ops.precondition_, v stays, no z": precondition("cpu", v_stays=True, with_z=False),
        "reference.precondition_": precondition("torch"),
    },
}


LOSSES = [F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits]
GRADIENT, FUSED = "forward and backward of the loss", "fused, loss and both products"
CLOSED_FORM = "closed form in torch"
LOSS_CALLS = GRADIENT, FUSED, CLOSED_FORM


def loss_calls(loss: Any, rows: int, columns: int) -> dict[str, Call]:
    """Everything that a step asks of a loss: c, and the five products; and the gradient alone."""
    torch.manual_seed(0)
    x, v, u = (torch.randn(rows, columns) for _ in range(3))
    target = torch.randint(0, columns, (rows,)) if loss is F.cross_entropy else torch.rand(rows, columns)
    leaf = x.clone().requires_grad_()

    def step(products: Products | None) -> Tensor:
        assert products is not None
        _, products_with = products.at(v)
        return products_with(u)

    return {
        GRADIENT: lambda: torch.autograd.grad(loss(leaf, target), leaf),
        FUSED: lambda: step(fused_losses.fused(loss, (x, target), {}, 1.0, "cpu")),
        CLOSED_FORM: lambda: step(closed_form_losses.products(closed_form_losses.CLOSED_FORMS[loss](x, target), 1.0)),
    }
