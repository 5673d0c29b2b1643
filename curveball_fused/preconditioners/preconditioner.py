"""P of all parameters of a step: the direction u = P⁻¹r, the dot products that the solve needs, and what P learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from curveball_fused import ops
from curveball_fused.backends.scalars import GATHERED

from .blocks import SIDES, SQUARE_AVERAGE, Block

DECAY = 0.9  # of the factors and of the squares, a step
EPSILON = 1e-8  # added to √v̂, in the units of the gradient


class Direction(NamedTuple):
    """What P makes of r.

    Attributes:
        u: P⁻¹r, of the parameters' shapes, in float32 at least.
        dots: float64 `[z·Pz, z·r, r·u]`; the first two are zero where z was not given.
        r: as it was given.
        turned: r in the bases of P.
        weight: 1 - decayᵗ, the sum of the weights in v with this step's squares in it, 0-dim float64.
    """

    u: list[Tensor]
    dots: Tensor
    r: Sequence[Tensor]
    turned: list[Tensor]
    weight: Tensor


class Preconditioner:
    """P, as the state of the parameters has it.

    Args:
        states: of the parameters that are trained, with what `fresh_state` has made.
        scalars: of the last step.
        backend: whose kernels do the arithmetic.
        gather: whether the factors see r in this step.
    """

    def __init__(self, states: Sequence[Mapping[str, Tensor]], scalars: Tensor, backend: str, gather: bool) -> None:
        self._states = states
        self._squares = [state[SQUARE_AVERAGE] for state in states]
        self._scalars = scalars
        self._backend = backend
        self._gather = gather

    def direction(self, r: Sequence[Tensor], z: Sequence[Tensor] | None = None) -> Direction:
        """Return P⁻¹r, for the P that has seen r; P itself stays as it is until `learn`.

        Args:
            r: Jᵀc, of the parameters' shapes, without a loss scale.
            z: the state, where its dot products are needed (default: None).
        """
        weight = DECAY * self._scalars[GATHERED] + (1 - DECAY)
        left, right = ([state.get(basis) for state in self._states] for _, basis in SIDES)
        u, turned, dots = ops.precondition_in_bases(
            self._squares, r, z, weight, left=left, right=right, decay=DECAY, eps=EPSILON, backend=self._backend
        )
        return Direction(u, dots, r, turned, weight)

    def learn(self, direction: Direction, scalars: Tensor) -> Tensor:
        """Let P see r; return the scalars with the new weight. A step that is skipped leaves P as it is."""
        left, right = ([state.get(factor) for state in self._states] for factor, _ in SIDES)
        return ops.update_statistics_(
            self._squares,
            direction.turned,
            direction.r,
            scalars,
            direction.weight,
            left=left,
            right=right,
            decay=DECAY,
            gather=self._gather,
            backend=self._backend,
        )

    def blocks(self) -> list[Block]:
        """Return those of the parameters, in their order."""
        return [Block.of(state) for state in self._states]
