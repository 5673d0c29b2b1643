"""One parameter's block of P: the eigenbases of its Kronecker factors, and a diagonal in them.

A parameter of two or more dimensions is the matrix M of its first dimension by all others. With the decayed averages L
of MMᵀ and R of MᵀM over the gradients M, and their eigenbases Q and S,

    P⁻¹M = Q [(QᵀM S) / (√v̂ + ε)] Sᵀ,   v̂ the average of the squares of QᵀM S:

Shampoo's factors (Gupta et al. 2018) with Adam in their eigenbasis, as in SOAP (Vyas et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype

SQUARE_AVERAGE = "square_average"  # the name of v, which every block has
NAMES = (SQUARE_AVERAGE, "left_factor", "left_basis", "right_factor", "right_basis")
LARGEST_SIDE = 1024  # a longer side keeps no factor: its basis would take more memory and time than the net


class Side(NamedTuple):
    """One Kronecker factor of a block, and the orthogonal matrix that nearly diagonalizes it."""

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
        left, right = (
            Side(state[f"{side}_factor"], state[f"{side}_basis"]) if f"{side}_factor" in state else None
            for side in ("left", "right")
        )
        return cls(state[SQUARE_AVERAGE], left, right)

    @property
    def sides(self) -> list[Side]:
        """Those that have a factor."""
        return [side for side in (self.left, self.right) if side is not None]

    def widened(self) -> Block:
        """Return the block in float64."""
        wide = [None if side is None else Side(side.factor.double(), side.basis.double()) for side in self[1:]]
        return Block(self.square_average.double(), *wide)

    def to_basis(self, r: Tensor) -> Tensor:
        """Return QᵀM S of a tensor of the parameter's shape."""
        r = r.to(self.square_average.dtype)
        if not self.sides:
            return r
        m = _matrix(r)
        if self.left is not None:
            m = self.left.basis.T @ m
        if self.right is not None:
            m = m @ self.right.basis
        return m.view(r.shape)

    def from_basis(self, turned: Tensor) -> Tensor:
        """Return M of QᵀM S."""
        if not self.sides:
            return turned
        m = _matrix(turned)
        if self.left is not None:
            m = self.left.basis @ m
        if self.right is not None:
            m = m @ self.right.basis.T
        return m.view(turned.shape)

    def gather(self, r: Tensor, keep: float, usable: Tensor) -> None:
        """Let the factors become keep · L + (1 - keep) MMᵀ and likewise R, unless `usable`, 0-dim bool, is false.

        A factor stays as it is where the trace of MMᵀ overflows, too, though no square in M does: neither it nor its
        basis would ever be finite again.
        """
        if not self.sides:
            return
        m = _matrix(r.to(self.square_average.dtype))
        for side, rows in ((self.left, m), (self.right, m.mT)):
            if side is not None:
                gram = rows @ rows.mT
                seen = usable & torch.isfinite(gram.trace())
                side.factor.lerp_(torch.where(seen, gram, side.factor), 1 - keep)


def shapes(p: Tensor) -> dict[str, tuple[int, ...]]:
    """Return what the state of a parameter holds for its block: names and shapes.

    A side has a factor where it is neither of one element nor longer than `LARGEST_SIDE`.
    """
    found: dict[str, tuple[int, ...]] = {SQUARE_AVERAGE: tuple(p.shape)}
    rows, columns = (p.shape[0], p.numel() // p.shape[0]) if p.ndim >= 2 and p.numel() else (0, 0)
    for side, length in (("left", rows), ("right", columns)):
        if 1 < length <= LARGEST_SIDE:
            found |= dict.fromkeys((f"{side}_factor", f"{side}_basis"), (length, length))
    return found


def multiply_adds(p: Tensor) -> int:
    """Return those of u = P⁻¹r for one parameter: two products with each basis, of m² n for a side of m beside n."""
    sides = (shape[0] for name, shape in shapes(p).items() if name.endswith("_basis"))
    return sum(2 * length * p.numel() for length in sides)


def fresh_state(p: Tensor) -> dict[str, Tensor]:
    """Return the state of a new block: no gradient seen, and the bases those that the parameter is written in."""
    options: dict[str, Any] = dict(dtype=compute_dtype(p.dtype), device=p.device)
    return {
        name: torch.eye(shape[0], **options) if name.endswith("_basis") else torch.zeros(shape, **options)
        for name, shape in shapes(p).items()
    }


def _matrix(t: Tensor) -> Tensor:
    return t.reshape(t.shape[0], -1)
