"""float16 without underflow: what passes through the model is brought to the middle of that format's range, and back.

float16 holds 6e-5 to 65504 in full precision. The cotangent c is multiplied by a loss scale S before it is pulled back,
so that r = S Jᵀc, as `torch.amp.GradScaler` does it for gradients: S falls when r overflows, by which the step is
skipped, and grows after many steps without. The tangents z and r, which J takes in, are brought to a root mean square
T, which falls and grows in the same way, by what J makes of them. All factors are powers of two, on the device, so that
nothing is rounded that float16 would not round.

A step sees the model through `WideLinearMap`, or, where the model computes in float16, through `ScaledLinearMap`: that
is all it has to know of precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from typing_extensions import override

from curveball_fused import ops
from curveball_fused._torch_private import foreach_mul, scaled_optimizers
from curveball_fused.backends.dtypes import at_least_float32
from curveball_fused.backends.scalars import BETA, DIRECTION_DAMPING, LAMBD
from curveball_fused.curvature import LinearMap, Pullback

_LEAST_S, _MOST_S = 2.0**-16, 2.0**24
# At the most, elements of 2^-8 of the mean are as precise as any; at the least, the mean is the smallest such number.
_LEAST_T, _MOST_T = 2.0**-14, 2.0**-6
_PATIENCE_S, _PATIENCE_T = 2000, 200


class Overflow(NamedTuple):
    """What a step found to be more than float16 holds: r; J z or J r of a finite r. 0-dim bool each."""

    r: Tensor
    tangents: Tensor


class WideLinearMap:
    """J of a model as a step sees it: in float32 at least, whatever the model computes in.

    Args:
        linear: the model's own map; one without `jvp` will do where only `vjp` is asked for.
        dtype: of the model's outputs.
    """

    is_scaled = False

    def __init__(self, linear: LinearMap | Pullback, dtype: torch.dtype) -> None:
        self._linear: LinearMap | Pullback | None = linear
        self._dtype = dtype
        self._difference: Tensor | None = None

    def release(self) -> None:
        """Free the memory of the map, of which no more products will be asked for."""
        self._difference = self.difference_of_runs()
        self._linear = None

    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        """Return r = Jᵀu."""
        return cast(Pullback, self._linear).vjp(cotangent.to(self._dtype))

    @property
    def operators(self) -> frozenset[str]:
        """What the model consists of, as the map's own method sees it."""
        return cast(LinearMap, self._linear).operators

    def compare_runs(self) -> None:
        """Compare the outputs of further runs of the model with those of the first."""
        cast(LinearMap, self._linear).compare_runs()

    def difference_of_runs(self) -> Tensor | None:
        """Return how far the compared outputs differ; None where the model runs once."""
        return self._difference if self._linear is None else cast(LinearMap, self._linear).difference_of_runs()

    def without_graph(self) -> list[Tensor]:
        """Return what the run of the model has left, depends on the parameters, and has no graph that tells so."""
        return cast(Pullback, self._linear).without_graph()

    def jvp_along(self, r: Sequence[Tensor], dots: Tensor | None) -> Tensor:
        """Return J r of what `vjp` returned; `dots` are `[z·z, z·r, r·r]`, unscaled, if they are known."""
        return self.jvp(r)

    def jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        """Return J v of any v, in the parameters' shapes."""
        return at_least_float32(self._jvp(tangents))

    def _jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        return cast(LinearMap, self._linear).jvp(tangents)[1]

    def unscaled(self, r: list[Tensor]) -> list[Tensor]:
        """Return r without what `vjp` multiplied it by."""
        return r

    def unscaled_dots(self, dots: Tensor) -> Tensor:
        """Return `[z·z, z·r, r·r]` of that r, from the dot products of what `vjp` returned."""
        return dots

    def overflow(self, loss: Tensor, products: Tensor, dots: Tensor | None) -> Overflow | None:
        """Return what the model's precision could not hold, None where it holds all that float32 does."""
        return None


class ScaledLinearMap(WideLinearMap):
    """J of a model that computes in float16: `vjp` returns S Jᵀu, and J is applied to tangents of size T."""

    is_scaled = True

    def __init__(
        self, linear: LinearMap | Pullback, dtype: torch.dtype, loss_scale: Tensor, tangent_size: Tensor
    ) -> None:
        super().__init__(linear, dtype)
        self._loss_scale = loss_scale
        self._tangent_size = tangent_size

    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        """Return S r = S Jᵀu."""
        return super().vjp(cotangent * self._loss_scale.float())

    def jvp_along(self, r: Sequence[Tensor], dots: Tensor | None) -> Tensor:
        """Return J r of the r that belongs to S r, which `vjp` returned."""
        assert dots is not None
        scaled = scale_tangents(r, dots[2] * self._loss_scale**2, self._tangent_size)
        return scaled.unscale(self._jvp(scaled.tangents)) / self._loss_scale.float()

    @override
    def jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        squares = ops.dots(tangents, tangents)[0]
        scaled = scale_tangents(tangents, squares, self._tangent_size)
        return scaled.unscale(self._jvp(scaled.tangents))

    def unscaled(self, r: list[Tensor]) -> list[Tensor]:
        """Return r of S r, in float32 at least."""
        return unscaled(r, self._loss_scale)

    def unscaled_dots(self, dots: Tensor) -> Tensor:
        """Return `[z·z, z·r, r·r]` from those of S r."""
        one = torch.ones_like(self._loss_scale)
        return dots / torch.stack((one, self._loss_scale, self._loss_scale**2))

    def overflow(self, loss: Tensor, products: Tensor, dots: Tensor | None) -> Overflow | None:
        """Return what float16 could not hold, by products of J z and perhaps J r, as they were computed."""
        assert dots is not None
        of_z, r, rest = (torch.isfinite(part).all() for part in (products[:2], dots[2], products))
        ordinary = torch.isfinite(loss)
        return Overflow(ordinary & of_z & ~r, ordinary & (~of_z | (r & ~rest)))


def unscaled(r: Sequence[Tensor], loss_scale: Tensor) -> list[Tensor]:
    """Return r of S r, in float32 at least."""
    return [at_least_float32(r_i) / loss_scale.float() for r_i in r]


class ScaledTangents(NamedTuple):
    """Tangents v, and the factor (0-dim float32, a power of two) by which they have been multiplied."""

    tangents: list[Tensor]
    factor: Tensor

    def unscale(self, image: Tensor) -> Tensor:
        """Return J v, in float32 at least, from the image of the scaled tangents."""
        return at_least_float32(image) / self.factor


def scale_tangents(tangents: Sequence[Tensor], squares: Tensor, size: Tensor) -> ScaledTangents:
    """Return `tangents` times the power of two that brings their root mean square to about `size`, in float32.

    Args:
        tangents: of any shapes.
        squares: their sum of squares, 0-dim; where it is zero or not finite, the factor is 1.
        size: the wanted root mean square, 0-dim.
    """
    wanted = size / (squares / max(1, sum(t.numel() for t in tangents))).sqrt()
    factor = wanted / (2 * torch.frexp(wanted).mantissa)
    factor = torch.where(torch.isfinite(factor) & (factor > 0), factor, 1.0).float()
    return ScaledTangents(list(foreach_mul([at_least_float32(t) for t in tangents], factor)), factor)


def adapted(scale: Tensor, overflow: Overflow) -> Tensor:
    """Return the scales of the next step: S/2 or T/16 after an overflow; 2S after 2000 steps without one, 2T after 200.

    T grows sooner, as what is not a number for another reason counts as an overflow of tangents.
    """
    s, t, steps = scale.unbind()
    steps = torch.where(overflow.r | overflow.tangents, 0.0, steps + 1)
    grows_s, grows_t = steps >= _PATIENCE_S, (steps > 0) & (torch.remainder(steps, _PATIENCE_T) == 0)
    s = torch.where(overflow.r, s / 2, torch.where(grows_s, 2 * s, s)).clamp(_LEAST_S, _MOST_S)
    t = torch.where(overflow.tangents, t / 16, torch.where(grows_t, 2 * t, t)).clamp(_LEAST_T, _MOST_T)
    return torch.stack((s, t, torch.where(grows_s, 0.0, steps)))


def update_by_scaled(update: Callable[[Tensor], Tensor], scalars: Tensor, factor: Tensor) -> Tensor:
    """Return `update(scalars)` where its r is S r: (ρ - βs) z - (β/S) (S r), by β/S and Ss in the places of β and s.

    s is the direction damping, θλ.
    """
    folded = scalars.clone()
    folded[BETA].div_(factor)
    folded[DIRECTION_DAMPING].mul_(factor)
    updated = update(folded)
    return torch.cat((scalars[: LAMBD + 1], updated[LAMBD + 1 : DIRECTION_DAMPING], scalars[DIRECTION_DAMPING:]))


def scale_from(scaler: torch.amp.GradScaler, device: torch.device) -> Tensor:
    """Return S, 0-dim float64, of torch's own scaler."""
    return scaler.scale(torch.ones((), dtype=torch.float64, device=device))


def report_overflow(scaler: torch.amp.GradScaler, optimizer: Optimizer, overflow: Tensor) -> None:
    """Let the scaler's next `update` know of an overflow, which it looks for in gradients: in that of a stand-in.

    There is one for each optimizer, as a scaler counts them by identity; they live as long as the scaler, which may
    remember that of an optimizer that is gone.
    """
    own = _stand_ins.setdefault(scaler, {})
    stand_in = own.get(id(optimizer))
    if stand_in is None or stand_in.param_groups[0]["params"][0].device != overflow.device:
        stand_in = own[id(optimizer)] = SGD([torch.zeros((), dtype=torch.float32, device=overflow.device)])
    stand_in.param_groups[0]["params"][0].grad = torch.where(overflow, torch.inf, 0.0).float()
    scaler.unscale_(stand_in)


def awaits_update(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Return whether the scaler was told of this optimizer's last step, and not yet updated."""
    told = scaled_optimizers(scaler)  # which `update` empties
    return id(_stand_ins.get(scaler, {}).get(id(optimizer))) in told


_stand_ins: WeakKeyDictionary[torch.amp.GradScaler, dict[int, Optimizer]] = WeakKeyDictionary()
