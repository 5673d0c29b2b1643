"""CurveBall as one writes it first: its equations in plain PyTorch, for comparison.

Jacobian-vector products by double backward, each with a backward graph of its own; one torch call per parameter
and operation; β and ρ on the host. Kinder than the authors' script in one thing: for its dot products that one also
concatenates all of Δ, and all of z, into a vector, which costs what copying them costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

FACTOR, INTERVAL = 0.999, 5


class PlainCurveBall:
    """z ← ρ z - β Δ, w ← w + z, with Δ = Jᵀ(H Jz + g) + λ z, and β, ρ from the 2x2 system."""

    def __init__(self, params: Iterable[Tensor], lambd: float = 1.0) -> None:
        self._params = list(params)
        self._z = [torch.zeros_like(p) for p in self._params]
        self._lambd = lambd
        self._steps = 0

    def step(self, model_fn: Callable[[], Tensor], loss_fn: Callable[[Tensor], Tensor]) -> Tensor:
        """One step; returns the loss before it. λ is adapted in the first and every fifth step after it."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention cannot be differentiated twice
            return self._step(model_fn, loss_fn)

    def _step(self, model_fn: Callable[[], Tensor], loss_fn: Callable[[Tensor], Tensor]) -> Tensor:
        params, z, lambd = self._params, self._z, self._lambd
        outputs = model_fn()
        leaf = outputs.detach().requires_grad_()
        loss = loss_fn(leaf)
        (gradient,) = grad(loss, leaf, create_graph=True)

        def hessian(v: Tensor) -> Tensor:
            return grad(gradient, leaf, v, retain_graph=True)[0]

        jz = _jvp(outputs, params, z)
        h_jz = hessian(jz)
        r = grad(outputs, params, h_jz + gradient.detach(), retain_graph=True)
        delta = [r_i + lambd * z_i for r_i, z_i in zip(r, z, strict=True)]
        j_delta = _jvp(outputs, params, delta)
        h_delta = hessian(j_delta)

        a11 = (j_delta * h_delta).sum() + lambd * _dot(delta, delta)
        a12 = (jz * h_delta).sum() + lambd * _dot(z, delta)
        a22 = (jz * h_jz).sum() + lambd * _dot(z, z)
        b1, b2 = (gradient * j_delta).sum(), (gradient * jz).sum()
        system = torch.tensor([[a11.item(), a12.item()], [a12.item(), a22.item()]])
        right = torch.tensor([b1.item(), b2.item()])
        solution = torch.linalg.pinv(system) @ right
        beta, rho = solution[0].item(), -solution[1].item()

        with torch.no_grad():
            for w_i, z_i, d_i in zip(params, z, delta, strict=True):
                z_i.mul_(rho).add_(d_i, alpha=-beta)
                w_i.add_(z_i)
            if self._steps % INTERVAL == 0:
                change = -0.5 * (solution @ right).item()
                ratio = (loss_fn(model_fn()) - loss).item() / change
                if ratio < 0.5:
                    self._lambd /= FACTOR**INTERVAL
                elif ratio > 1.5:
                    self._lambd *= FACTOR**INTERVAL
        self._steps += 1
        return loss.detach()


def _jvp(outputs: Tensor, params: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    """Jv: u ↦ Jᵀu is linear, so the derivative of <Jᵀu, v> with respect to u is Jv, whatever u."""
    u = torch.zeros_like(outputs, requires_grad=True)
    pulled_back = grad(outputs, params, u, create_graph=True)
    return grad(pulled_back, u, v, retain_graph=True)[0]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()
