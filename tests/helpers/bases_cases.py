"""Tensors with bases for their sides, and the same by dense float64 matrices: operators of a Kronecker metric."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from curveball_fused import backends
from curveball_fused.backends.scalars import BETA, RHO, SCALARS

NATIVE = backends.has_operators()
BACKENDS = ["torch"] + (["cpu"] if NATIVE else [])
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
native_only = pytest.mark.skipif(not NATIVE, reason="needs the native kernels")
NAN, INF = float("nan"), float("inf")


class Case(NamedTuple):
    """A tensor, and for each of its sides: None, "whole", or the length of its pieces."""

    shape: tuple[int, ...]
    left: str | int | None
    right: str | int | None


# Below, at and above a register, the columns that are summed at once, and what is packed at once; pieces that divide
# their side and that reach beyond it.
CASES = [
    Case((3, 4), "whole", "whole"),
    Case((1, 5), None, "whole"),
    Case((5, 1), "whole", None),
    Case((7,), None, None),
    Case((), None, None),
    Case((0, 4), None, None),
    Case((2, 3, 2, 2), "whole", "whole"),
    Case((6, 16), "whole", "whole"),
    Case((13, 17), "whole", "whole"),
    Case((12, 32), None, "whole"),
    Case((33, 31), "whole", None),
    Case((300, 40), "whole", "whole"),  # as states of earlier versions have it
    Case((40, 300), 20, 100),
    Case((41, 300), 14, 101),
    Case((100, 65), 7, "whole"),
    Case((2000, 6), None, "whole"),
    Case((6, 2000), "whole", None),
    Case((130, 270), None, 90),
    Case((50_000,), None, None),
]
# For all but CPUs, tensors that are alike go through one product: here each has a fellow, and none is its neighbor.
LISTS = [*([case] for case in CASES), CASES, [*CASES, *CASES]]
every_list = pytest.mark.parametrize("cases", LISTS, ids=lambda c: f"{len(c)} {c[0].shape}")


class Problem(NamedTuple):
    v: list[Tensor]
    r: list[Tensor]
    z: list[Tensor]
    left: list[Tensor | None]
    right: list[Tensor | None]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def lengths(shape: tuple[int, ...]) -> tuple[int, int]:
    rows = shape[0] if len(shape) > 1 else 1
    return rows, torch.Size(shape).numel() // max(rows, 1)


def orthogonal(length: int, how: str | int | None, dtype: torch.dtype) -> Tensor | None:
    """A basis; beyond a side that its pieces do not divide it is the identity, as it is in training."""
    if how is None:
        return None
    if how == "whole":
        return torch.linalg.qr(torch.randn(length, length, dtype=torch.float64))[0].to(dtype)
    pieces = -(-length // how)
    basis = torch.zeros(pieces, how, how, dtype=torch.float64)
    for i in range(pieces):
        n = min(how, length - i * how)
        basis[i] = torch.eye(how)
        basis[i, :n, :n] = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    return basis.to(dtype)


def dense(square: Tensor, length: int) -> Tensor:
    """A basis or factor as one matrix, in float64."""
    pieces = square.double() if square.dim() == 3 else square.double()[None]
    return torch.block_diag(*pieces)[:length, :length]


def make(cases: list[Case], dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    v = [torch.rand(case.shape, dtype=torch.float64).to(dtype) for case in cases]
    r, z = ([torch.randn(case.shape, dtype=torch.float64).to(dtype) for case in cases] for _ in "rz")
    sides = [[orthogonal(n, how, dtype) for n, how in zip(lengths(case.shape), case[1:])] for case in cases]
    return Problem(v, r, z, [side[0] for side in sides], [side[1] for side in sides])


def turned(p: Problem, tensors: list[Tensor]) -> list[Tensor]:
    result = []
    for t, left, right in zip(tensors, p.left, p.right):
        rows, columns = lengths(t.shape)
        m = t.double().reshape(rows, columns)
        if left is not None:
            m = dense(left, rows).T @ m
        if right is not None:
            m = m @ dense(right, columns)
        result.append(m.reshape(t.shape))
    return result


def scalars(beta: float = 0.3, rho: float = 0.8) -> Tensor:
    result = torch.arange(len(SCALARS), dtype=torch.float64)
    result[BETA], result[RHO] = beta, rho
    return result


def factor(q: Tensor | None, length: int) -> Tensor | None:
    """A symmetric one, and zero beyond its side."""
    if q is None:
        return None
    result = q * torch.linspace(0.5, 2, q.shape[-1], dtype=q.dtype) @ q.mT
    result = (result + result.mT) / 2
    if q.dim() == 3 and (beyond := q.shape[0] * q.shape[1] - length):
        result[-1, -beyond:] = 0
    return result


def factors_of(p: Problem) -> tuple[list[Tensor | None], ...]:
    return tuple(
        [factor(q, lengths(t.shape)[i]) for q, t in zip(side, p.r, strict=True)]
        for i, side in enumerate((p.left, p.right))
    )
