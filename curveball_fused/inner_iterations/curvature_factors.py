"""The preconditioner of the inner iterations: Kronecker factors of the curvature G = JᵀHJ itself.

For a random s of signs, x = √κ JᵀHs with κ = s·Hs / Hs·Hs has the second moment E[xxᵀ] = κ JᵀH²J, which is G where H is
a multiple of the identity, as that of a squared error is. With M, the matrix of such an x in a parameter, the averages
of MMᵀ and MᵀM have the eigenbases Q and S, and v, the average of the squares of QᵀMS, is the diagonal of G there:

    (G + λ)⁻¹R ≈ Q [(QᵀRS) / (v̂ + λ)] Sᵀ.

K-FAC (Martens and Grosse 2015) with the diagonal in the eigenbasis of its factors (George et al. 2018), from products
that any model and loss have. It changes how soon the iterations converge, and not where to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from curveball_fused.backends.reference.bases import gather_
from curveball_fused.backends.reference.preconditioners import is_taken
from curveball_fused.backends.scalars import GATHERED, LAMBD
from curveball_fused.preconditioners import NAMES, SIDES, Block, refresh_sides

DECAY = 0.95  # of factors and squares, a probe
PROBES, FIRST_PROBES = 2, 6  # a step; in the first one
FLOOR = 0.03  # of the mean of v̂, added to λ: a direction that no probe has seen need not be flat


class CurvatureFactors:
    """The factors of all parameters, in copies that `write` puts in the place of the state's.

    Args:
        states: of the parameters, with the tensors of a `Block`.
        scalars: of the last step.
    """

    def __init__(self, states: Sequence[Mapping[str, Tensor]], scalars: Tensor) -> None:
        self._states = states
        self._copies = [{name: state[name].clone() for name in NAMES if name in state} for state in states]
        self._blocks = [Block.of(copy) for copy in self._copies]
        self._weight = scalars[GATHERED]

    def see(self, probes: Sequence[Sequence[Tensor]]) -> None:
        """Let the factors see x of some probes, bring the bases up to date, and let the diagonals see them there."""
        with torch.autocast(self._weight.device.type, enabled=False):
            self._see(probes)

    def _see(self, probes: Sequence[Sequence[Tensor]]) -> None:
        left, right = ([copy.get(factor) for copy in self._copies] for factor, _ in SIDES)
        always = torch.ones_like(self._weight, dtype=torch.bool)
        for x in probes:
            gather_(x, left, right, DECAY, always)
        refresh_sides([side for block in self._blocks for side in block.sides], always)
        for x in probes:
            self._weight = DECAY * self._weight + (1 - DECAY)
            for block, x_i in zip(self._blocks, x, strict=True):
                turned = block.to_bases(x_i.to(block.square_average.dtype))
                block.square_average.mul_(DECAY).addcmul_(turned, turned, value=1 - DECAY)

    def solve(self, r: Sequence[Tensor], scalars: Tensor) -> list[Tensor]:
        """Return an approximation of (G + λ)⁻¹r."""
        count = sum(block.square_average.numel() for block in self._blocks)
        total = torch.stack([block.square_average.sum(dtype=torch.float64) for block in self._blocks]).sum()
        shift = scalars[LAMBD] + FLOOR * total / (count * self._weight)
        shift = torch.where(shift > 0, shift, 1.0)  # of no damping, and probes that have seen no curvature
        found = []
        with torch.autocast(shift.device.type, enabled=False):
            for block, r_i in zip(self._blocks, r, strict=True):
                v = block.square_average
                curvature = v / self._weight.to(v.dtype) + shift.to(v.dtype)
                found.append(block.from_bases(block.to_bases(r_i.to(v.dtype)) / curvature))
        return found

    def write(self, scalars: Tensor) -> Tensor:
        """Write the factors to the state unless the step is skipped; return the scalars with the new weight."""
        taken = is_taken(scalars)
        for state, copy in zip(self._states, self._copies, strict=True):
            for name, t in copy.items():
                state[name].copy_(torch.where(taken, t, state[name]))
        scalars = scalars.clone()
        scalars[GATHERED] = torch.where(taken, self._weight, scalars[GATHERED])
        return scalars


def probes(
    curvature_times: Callable[[Tensor], Tensor], vjp: Callable[[Tensor], list[Tensor]], outputs: Tensor, step: int
) -> list[list[Tensor]]:
    """Return x = √κ JᵀHs of the probes of a step, whose signs s follow from its number alone.

    Args:
        curvature_times: t ↦ H t.
        vjp: c ↦ Jᵀc.
        outputs: of the model.
        step: its number, counted from zero.
    """
    generator = torch.Generator(outputs.device).manual_seed(step)  # the user's own are not advanced
    found = []
    for _ in range(PROBES if step else FIRST_PROBES):
        bits = torch.randint(2, outputs.shape, generator=generator, device=outputs.device)
        signs = bits.to(outputs.dtype) * 2 - 1
        hs = curvature_times(signs)
        square = (hs * hs).sum()
        scale = ((signs * hs).sum().clamp(min=0) / torch.where(square == 0, 1, square)).sqrt()
        found.append(vjp(scale * hs))
    return found
