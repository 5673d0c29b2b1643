"""Debug mode's measures: difference quotients, and how far a Jacobian-vector product is from them.

A product is right where it lies between the two one-sided quotients. At a kink, such as relu's at zero, they differ,
and any subgradient will do; where the function is smooth they all but agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differences(
    jvs: Sequence[Tensor],
    along: Callable[[float], Sequence[Tensor]],
    middle: Sequence[Tensor],
    floors: Sequence[float],
) -> float:
    """Compare tangents with difference quotients.

    Args:
        jvs: the tangents of several results.
        along: maps a step t to the results at x + t v.
        middle: the results at x.
        floors: for each, the least root mean square to which errors are relative.

    Returns:
        The largest relative distance of a tangent from what lies between the one-sided quotients.
    """
    coarse, fine = (difference_quotients(along, middle, factor) for factor in (1.0, 0.125))
    worst = 0.0
    for jv, (first, wide), (second, narrow), floor in zip(jvs, coarse, fine, floors, strict=True):
        error = min(_excess(jv, first, wide, floor), _excess(jv, second, narrow, floor))
        # Difference quotients that disagree among themselves, as at a jump, prove nothing.
        if relative(first - second, second) < 0.5 * min(1.0, error):
            worst = max(worst, error)
    return worst


def _excess(jv: Tensor, derivative: Tensor, margin: Tensor, floor: float) -> float:
    """Return the relative distance of `jv` from the interval derivative ± margin."""
    judged = derivative.isfinite() & margin.isfinite()
    excess = ((jv.to(derivative.dtype) - derivative).abs() - margin).nan_to_num(nan=math.inf).clamp(min=0)
    return relative(excess[judged], derivative[judged], floor * math.sqrt(int(judged.sum())))


def difference_quotients(
    along: Callable[[float], Sequence[Tensor]], middle: Sequence[Tensor], factor: float
) -> list[tuple[Tensor, Tensor]]:
    """Return, for each result, the central difference quotient, and its margin.

    Args:
        along: maps a step t to the results at x + t v.
        middle: the results at x.
        factor: of the step ε^(1/3), with ε the machine epsilon of the results.

    Returns:
        Pairs of (f(t) - f(-t)) / 2t and half the distance of the one-sided quotients, with what rounding may add.
    """
    eps = max(torch.finfo(m.dtype).eps for m in middle)
    step = factor * eps ** (1 / 3)
    found = []
    for before, here, after in zip(along(-step), middle, along(step), strict=True):
        kink = (after - 2 * here + before).abs() / (2 * step)
        found.append(((after - before) / (2 * step), kink + 8 * eps * here.abs() / step))
    return found


def relative(error: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    """Return |error| / |reference|, of the elements that are finite in the reference; 0 where both are 0."""
    judged = reference.isfinite() & (error.isfinite() | error.isinf())
    size, scale = (float(t[judged].double().norm()) for t in (error, reference))
    scale = max(scale, floor)
    return size / scale if scale > 0 else (math.inf if size > 0 else 0.0)


def size(t: Tensor) -> float:
    """Return the root mean square of the elements that are finite."""
    found = real(t)
    found = found[found.isfinite()].double()
    return float(found.square().mean().sqrt()) if found.numel() else 0.0


def real(t: Tensor) -> Tensor:
    """Return `t` detached, with the two parts of complex numbers in a last dimension."""
    t = t.detach()
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def dot(a: Tensor, b: Tensor) -> float:
    """Return <a, b> in float64; of complex numbers, that of their parts."""
    return float((real(a).double() * real(b).double()).sum())
