"""One parameter's block of P: the eigenbases of its Kronecker factors, and a diagonal in them.

A parameter of two or more dimensions is the matrix M of its first dimension by all others. With the decayed averages L
of MMᵀ and R of MᵀM over the gradients M, and their eigenbases Q and S,

    P⁻¹M = Q [(QᵀM S) / (√v̂ + ε)] Sᵀ,   v̂ the average of the squares of QᵀM S:

Shampoo's factors (Gupta et al. 2018) with Adam in their eigenbasis, as in SOAP (Vyas et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.reference.bases import from_bases, to_bases

SQUARE_AVERAGE = "square_average"  # the name of v, which every block has
SIDES = ("left_factor", "left_basis"), ("right_factor", "right_basis")  # the names of their tensors
NAMES = (SQUARE_AVERAGE, *SIDES[0], *SIDES[1])
LARGEST_SIDE = 1024  # a longer side keeps no factor: its basis would take more memory and time than the net
LARGEST_BASIS = 128  # a longer side has several bases, of as many elements each


class Side(NamedTuple):
    """One Kronecker factor of a block, and the orthogonal matrix that nearly diagonalizes it.

    Both are n x n for a side of n; a longer side is cut into k pieces of b, of which both know nothing but the pieces
    themselves: k x b x b, in which the last piece may reach beyond the side.
    """

    factor: Tensor
    basis: Tensor


class Block(NamedTuple):
    """One parameter's block of P.

    Attributes:
        square_average: v, of the parameter's shape, in the basis of both sides.
        left: the side of the rows; None where it has no factor.
        right: the side of the columns, likewise.
    """

    square_average: Tensor
    left: Side | None
    right: Side | None

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Block:
        """Return the block that the state of a parameter holds."""
        left, right = (Side(state[factor], state[basis]) if factor in state else None for factor, basis in SIDES)
        return cls(state[SQUARE_AVERAGE], left, right)

    @property
    def sides(self) -> list[Side]:
        """Those that have a factor."""
        return [side for side in (self.left, self.right) if side is not None]

    def widened(self) -> Block:
        """Return the block in float64."""
        wide = [None if side is None else Side(side.factor.double(), side.basis.double()) for side in self[1:]]
        return Block(self.square_average.double(), *wide)

    def to_bases(self, r: Tensor) -> Tensor:
        """Return QᵀM S of a tensor of the parameter's shape."""
        return to_bases(r, *self._bases())

    def from_bases(self, turned: Tensor) -> Tensor:
        """Return M of QᵀM S."""
        return from_bases(turned, *self._bases())

    def _bases(self) -> tuple[Tensor | None, Tensor | None]:
        left, right = (None if side is None else side.basis for side in (self.left, self.right))
        return left, right


def shapes(p: Tensor) -> dict[str, tuple[int, ...]]:
    """Return what the state of a parameter holds for its block: names and shapes.

    A side has a factor where it is neither of one element nor longer than `LARGEST_SIDE`, and several where it is
    longer than `LARGEST_BASIS`.
    """
    found: dict[str, tuple[int, ...]] = {SQUARE_AVERAGE: tuple(p.shape)}
    for side, length in _lengths(p).items():
        if 1 < length <= LARGEST_SIDE:
            pieces = math.ceil(length / LARGEST_BASIS)
            piece = math.ceil(length / pieces)
            shape = (length, length) if pieces == 1 else (pieces, piece, piece)
            found |= dict.fromkeys((f"{side}_factor", f"{side}_basis"), shape)
    return found


def has_block(state: Mapping[str, Tensor], p: Tensor) -> bool:
    """Return whether the state of a parameter has a block that fits it; that of an earlier version has whole sides."""
    lengths = _lengths(p)
    whole = {name: (lengths[name.split("_")[0]],) * 2 for name in shapes(p) if name != SQUARE_AVERAGE}
    return all(name in state and state[name].shape in (shape, whole.get(name)) for name, shape in shapes(p).items())


def multiply_adds(p: Tensor) -> int:
    """Return those of u = P⁻¹r for one parameter: two products with each basis, of b m n for pieces of b."""
    sides = (shape[-1] for name, shape in shapes(p).items() if name.endswith("_basis"))
    return sum(2 * length * p.numel() for length in sides)


def fresh_state(p: Tensor) -> dict[str, Tensor]:
    """Return the state of a new block: no gradient seen, and the bases those that the parameter is written in."""
    options: dict[str, Any] = dict(dtype=compute_dtype(p.dtype), device=p.device)
    state = {name: torch.zeros(shape, **options) for name, shape in shapes(p).items()}
    for name, t in state.items():
        if name.endswith("_basis"):
            t.diagonal(dim1=-2, dim2=-1).fill_(1)
    return state


def _lengths(p: Tensor) -> dict[str, int]:
    """Return those of both sides; zero where there is no matrix."""
    if p.ndim < 2 or not p.numel():
        return {"left": 0, "right": 0}
    return {"left": p.shape[0], "right": p.numel() // p.shape[0]}
