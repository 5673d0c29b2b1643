"""What a step measures: loss and outputs, r = Jᵀc, and the numbers that the 2x2 system is made of.

The products `[g·Jz, Jz·HJz, g·Jr, Jz·HJr, Jr·HJr]` come from the small output space; the dot products
`[z·z, z·r, r·r]` follow from them by adjointness, z·r = Jz·c and r·r = Jr·c, and are then None, or are taken directly.
Loss and products are computed in float32 at least, whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, debug, economy, loss_scale, ops
from .curvature import LinearMap, ModelFn, linearise
from .loss_scale import Overflow
from .losses import LossFn, LossModel
from .replay import Replay

_HALF = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Measured(NamedTuple):
    """Loss (0-dim) and outputs, detached; r, of the parameters' shapes; products, float64[5]; dots, float64[3].

    In float16 r is multiplied by the loss scale, while products and dots are of the true r, and there is `overflow`.
    """

    loss: Tensor
    outputs: Tensor
    r: list[Tensor]
    products: Tensor
    dots: Tensor | None
    overflow: Overflow | None


class Gradient(NamedTuple):
    """Jᵀg, of the parameters' shapes, and whether it is multiplied by the loss scale."""

    tensors: list[Tensor]
    scaled: bool


@dataclass
class Problem:
    """The parameters, the state and how to differentiate.

    Attributes:
        z_dot_z: 0-dim float64.
        ways: of linearising the model, in the order in which they are tried; from the first step on, without those
            that cannot follow it.
        half: "float16" or "bfloat16" where the model computes in it, as far as known; else "".
        loss_scale: S, 0-dim float64, for float16.
        tangent_size: T, 0-dim float64, for float16.
    """

    params: list[Tensor]
    z: list[Tensor]
    z_dot_z: Tensor
    ways: Sequence[str]
    half: str
    loss_scale: Tensor
    tangent_size: Tensor
    sign: float
    backend: str
    debug: bool
    _noticed: bool = False  # whether `half` is of this step

    def measure(
        self, model_fn: ModelFn, loss_fn: LossFn, replay: Replay, lagging: Tensor | None, gradient: Gradient | None
    ) -> Measured:
        """One step's measurements.

        Args:
            lagging: in a step between complete solves, the average of the last systems; None: a complete step.
            gradient: Jᵀg of another batch, to take the place of this one's in r.
        """
        hooked = any(p._backward_hooks for p in self.params)
        if lagging is not None and not hooked:
            return self._between_solves(model_fn, loss_fn, replay, lagging, gradient)
        way, linear, outputs, jz = self._linearised(model_fn, replay)
        model = self.loss_model(loss_fn, outputs, replay)
        cotangent, products_of = model.cotangent(jz)
        r = self._pulled_back(linear.vjp, cotangent, outputs, model, gradient)
        # Adjointness does not hold of gradients that are rounded to a lower precision or altered by a hook.
        direct = hooked or self.half == "float16" or gradient is not None or not self._precise()
        dots = self._dots(r) if direct else None
        jr = self._along_r(linear, r, dots)
        products = products_of(jr)
        overflow = self._overflow(model.loss, products, dots)
        if self.debug and gradient is None and not (overflow is not None and any(map(bool, overflow))):
            step = debug.Step(
                way, model_fn, loss_fn, self.sign, self.params, replay, self.z, outputs, jz, cotangent, self._true(r),
                jr, products,
            )  # fmt: skip
            debug.check(step)
        if gradient is not None:
            assert dots is not None
            products = economy.consistent(products, dots)
        return Measured(model.loss, outputs, r, products, dots, overflow)

    def measure_with_part(
        self,
        model_fn: ModelFn,
        loss_fn: LossFn,
        part: tuple[ModelFn, LossFn],
        replay: Replay,
        lagging: Tensor | None,
    ) -> Measured:
        """Loss, outputs and gradient of the whole batch, the curvature of a part of it."""
        checks.curvature_batch(part, self.params)
        whole = economy.Backward(model_fn, self.params, replay)
        self._notice(whole.outputs, replay)
        model = self.loss_model(loss_fn, whole.outputs, replay)
        cotangent = model.cotangent(torch.zeros_like(loss_scale.at_least_float32(whole.outputs)))[0]
        gradient = Gradient(self._scaled(whole.vjp, cotangent, whole.outputs), self.half == "float16")
        aside = Replay(self.params, self.params[0].device)
        try:
            measured = self.measure(*part, aside, lagging, gradient)
        finally:
            aside.rewind()
        overflow = measured.overflow
        if overflow is not None:  # a loss that is not finite is none
            overflow = Overflow(*(each & torch.isfinite(model.loss) for each in overflow))
        return measured._replace(loss=model.loss, outputs=whole.outputs, overflow=overflow)

    def loss_model(self, loss_fn: LossFn, outputs: Tensor, replay: Replay) -> LossModel:
        """The quadratic model of the loss at the outputs."""
        seen = loss_scale.at_least_float32(outputs)
        return LossModel(lambda out: replay.first(lambda: loss_fn(out)), seen, self.sign, self.params, self.backend)

    def _between_solves(
        self, model_fn: ModelFn, loss_fn: LossFn, replay: Replay, lagging: Tensor, gradient: Gradient | None
    ) -> Measured:
        """Without Jr: the curvature along r by ratios of the last systems."""
        vjp: Callable[[Tensor], list[Tensor]]
        # Double backward sees more than a moved parameter would change, and in half precision a difference drowns.
        if self._precise() and not self.half and self.ways[0] != "double_backward":
            linear, jz = economy.difference(model_fn, self.params, self.z, replay)
            outputs, vjp = linear.outputs, linear.vjp
            self._notice(outputs, replay)
        else:
            _, taped, outputs, jz = self._linearised(model_fn, replay)
            vjp = taped.vjp
        model = self.loss_model(loss_fn, outputs, replay)
        cotangent, products_of = model.cotangent(jz)
        r = self._pulled_back(vjp, cotangent, outputs, model, gradient)
        dots = self._dots(r)
        of_z = products_of(jz)
        products = economy.consistent(economy.lagged(lagging, of_z, dots), dots)
        return Measured(model.loss, outputs, r, products, dots, self._overflow(model.loss, of_z, dots))

    def _linearised(self, model_fn: ModelFn, replay: Replay) -> tuple[str, LinearMap, Tensor, Tensor]:
        """The way, the map, outputs, and Jz in float32 at least."""
        z = loss_scale.stretched(self.z, self.z_dot_z, self.tangent_size) if self.half == "float16" else None
        tangents = self.z if z is None else z.tangents
        way, linear, (outputs, jz) = linearise(self.ways, model_fn, self.params, tangents, replay, self.backend)
        self.ways = self.ways[self.ways.index(way) :]
        self._notice(outputs, replay)
        return way, linear, outputs, loss_scale.at_least_float32(jz) if z is None else z.shrink(jz)

    def _notice(self, outputs: Tensor, replay: Replay) -> None:
        """Which half precision the model computes in, in one of its runs of this step at least."""
        used = {_HALF.get(dtype, "") for dtype in (outputs.dtype, *replay.dtypes, *(p.dtype for p in self.params))}
        if self._noticed:
            used.add(self.half)
        self.half = next((half for half in _HALF.values() if half in used), "")
        self._noticed = True

    def _along_r(self, linear: LinearMap, r: list[Tensor], dots: Tensor | None) -> Tensor:
        """J r, of the true r, in float32 at least."""
        if self.half != "float16":
            return loss_scale.at_least_float32(linear.jvp(r)[1])
        assert dots is not None
        tangents = loss_scale.stretched(r, dots[2] * self.loss_scale**2, self.tangent_size)
        return tangents.shrink(linear.jvp(tangents.tangents)[1]) / self.loss_scale.float()

    def _pulled_back(
        self,
        vjp: Callable[[Tensor], list[Tensor]],
        cotangent: Tensor,
        outputs: Tensor,
        model: LossModel,
        gradient: Gradient | None,
    ) -> list[Tensor]:
        """r = Jᵀ(H_o Jz + g_o), or Jᵀ H_o Jz and the given gradient."""
        if gradient is None:
            return self._scaled(vjp, cotangent, outputs)
        own = model.cotangent(torch.zeros_like(cotangent))[0]
        parts, whole = self._scaled(vjp, cotangent - own, outputs), gradient.tensors
        if self.half == "float16" and not gradient.scaled:
            whole = [g * self.loss_scale.to(g.dtype) for g in whole]
        return [part + rest for part, rest in zip(parts, whole, strict=True)]

    def _true(self, r: list[Tensor]) -> list[Tensor]:
        """r without the loss scale."""
        if self.half != "float16":
            return r
        return [loss_scale.at_least_float32(r_i) / self.loss_scale.float() for r_i in r]

    def _overflow(self, loss: Tensor, products: Tensor, dots: Tensor | None) -> Overflow | None:
        """What float16 could not hold, by products of J z and perhaps J r, as they were computed."""
        if self.half != "float16":
            return None
        assert dots is not None
        of_z, r, rest = (torch.isfinite(part).all() for part in (products[:2], dots[2], products))
        ordinary = torch.isfinite(loss)
        return Overflow(ordinary & of_z & ~r, ordinary & (~of_z | (r & ~rest)))

    def _scaled(self, vjp: Callable[[Tensor], list[Tensor]], cotangent: Tensor, outputs: Tensor) -> list[Tensor]:
        """`Jᵀ u`, multiplied by the loss scale where the model computes in float16."""
        scaled = cotangent * self.loss_scale.float() if self.half == "float16" else cotangent
        return vjp(scaled.to(outputs.dtype))

    def _dots(self, r: list[Tensor]) -> Tensor:
        """`[z·z, z·r, r·r]` of the true r."""
        dots = ops.dots(self.z, r, backend=self.backend)
        if self.half != "float16":
            return dots
        one = torch.ones_like(self.loss_scale)
        return dots / torch.stack((one, self.loss_scale, self.loss_scale**2))

    def _precise(self) -> bool:
        return all(p.dtype in (torch.float32, torch.float64) for p in self.params)
