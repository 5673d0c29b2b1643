"""What a step measures: loss and outputs, r = Jᵀc, and the numbers that the 2x2 system is made of.

The products `[g·Jz, Jz·HJz, g·Jr, Jz·HJr, Jr·HJr]` come from the small output space; the dot products
`[z·z, z·r, r·r]` follow from them by adjointness, z·r = Jz·c and r·r = Jr·c, and are then None, or are taken directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, debug, economy, ops
from .curvature import ModelFn, linearise
from .losses import LossFn, LossModel
from .replay import Replay


class Measured(NamedTuple):
    """Loss (0-dim) and outputs, detached; r, of the parameters' shapes; products, float64[5]; dots, float64[3]."""

    loss: Tensor
    outputs: Tensor
    r: list[Tensor]
    products: Tensor
    dots: Tensor | None


@dataclass
class Problem:
    """The parameters, the state and how to differentiate.

    Attributes:
        ways: of linearising the model, in the order in which they are tried; from the first step on, without those
            that cannot follow it.
    """

    params: list[Tensor]
    z: list[Tensor]
    ways: Sequence[str]
    sign: float
    backend: str
    debug: bool

    def measure(
        self, model_fn: ModelFn, loss_fn: LossFn, replay: Replay, lagging: Tensor | None, gradient: list[Tensor] | None
    ) -> Measured:
        """One step's measurements.

        Args:
            lagging: in a step between complete solves, the average of the last systems; None: a complete step.
            gradient: Jᵀg of another batch, to take the place of this one's in r.
        """
        hooked = any(p._backward_hooks for p in self.params)
        if lagging is not None and not hooked:
            return self._between_solves(model_fn, loss_fn, replay, lagging, gradient)
        way, linear, (outputs, jz) = linearise(self.ways, model_fn, self.params, self.z, replay, self.backend)
        self.ways = self.ways[self.ways.index(way) :]
        model = self.loss_model(loss_fn, outputs, replay)
        cotangent, products_of = model.cotangent(jz)
        r = self._pulled_back(linear.vjp, cotangent, model, gradient)
        jr = linear.jvp(r)[1]
        products = products_of(jr)
        if self.debug and gradient is None:
            step = debug.Step(
                way, model_fn, loss_fn, self.sign, self.params, replay, self.z, outputs, jz, cotangent, r, jr, products
            )
            debug.check(step)
        if gradient is not None:
            dots = ops.dots(self.z, r, backend=self.backend)
            return Measured(model.loss, outputs, r, economy.consistent(products, dots), dots)
        # Adjointness does not hold of gradients that are rounded to a lower precision or altered by a hook.
        exact = self._precise() and not hooked
        return Measured(model.loss, outputs, r, products, None if exact else ops.dots(self.z, r, backend=self.backend))

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
        model = self.loss_model(loss_fn, whole.outputs, replay)
        gradient = whole.vjp(model.cotangent(torch.zeros_like(whole.outputs))[0])
        aside = Replay(self.params, self.params[0].device)
        try:
            measured = self.measure(*part, aside, lagging, gradient)
        finally:
            aside.rewind()
        return measured._replace(loss=model.loss, outputs=whole.outputs)

    def loss_model(self, loss_fn: LossFn, outputs: Tensor, replay: Replay) -> LossModel:
        """The quadratic model of the loss at the outputs."""
        return LossModel(lambda out: replay.first(lambda: loss_fn(out)), outputs, self.sign, self.params, self.backend)

    def _between_solves(
        self, model_fn: ModelFn, loss_fn: LossFn, replay: Replay, lagging: Tensor, gradient: list[Tensor] | None
    ) -> Measured:
        """Without Jr: the curvature along r by ratios of the last systems."""
        if self._precise() and self.ways[0] != "double_backward":  # which sees more than a moved parameter would change
            linear, jz = economy.difference(model_fn, self.params, self.z, replay)
            outputs, vjp = linear.outputs, linear.vjp
        else:  # a difference would drown in rounding
            _, taped, (outputs, jz) = linearise(self.ways, model_fn, self.params, self.z, replay, self.backend)
            vjp = taped.vjp
        model = self.loss_model(loss_fn, outputs, replay)
        cotangent, products_of = model.cotangent(jz)
        r = self._pulled_back(vjp, cotangent, model, gradient)
        dots = ops.dots(self.z, r, backend=self.backend)
        products = economy.lagged(lagging, products_of(jz), dots)
        return Measured(model.loss, outputs, r, economy.consistent(products, dots), dots)

    def _pulled_back(
        self,
        vjp: Callable[[Tensor], list[Tensor]],
        cotangent: Tensor,
        model: LossModel,
        gradient: list[Tensor] | None,
    ) -> list[Tensor]:
        """r = Jᵀ(H_o Jz + g_o), or Jᵀ H_o Jz and the given gradient."""
        if gradient is None:
            return vjp(cotangent)
        own = model.cotangent(torch.zeros_like(cotangent))[0]
        return [part + whole for part, whole in zip(vjp(cotangent - own), gradient, strict=True)]

    def _precise(self) -> bool:
        return all(p.dtype in (torch.float32, torch.float64) for p in self.params)
