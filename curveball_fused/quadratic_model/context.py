"""Where a step begins, and what it has measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from curveball_fused import guard, ops
from curveball_fused._torch_private import has_gradient_hooks
from curveball_fused.backends.dtypes import at_least_float32
from curveball_fused.batch import BatchMean
from curveball_fused.curvature import LinearMap, Pullback
from curveball_fused.data_parallel import Processes
from curveball_fused.loss_scale import Overflow, ScaledLinearMap, WideLinearMap
from curveball_fused.losses import LossFn, LossModel
from curveball_fused.preconditioners import Direction, Preconditioner
from curveball_fused.replay import Replay
from curveball_fused.settings import Settings


@dataclass(frozen=True)
class StepContext:
    """Where a step begins.

    Attributes:
        settings: the optimizer's options.
        params: w, those that are trained.
        z: the state, of the same shapes.
        z_dot_z: z·z, 0-dim float64.
        methods: of linearizing the model, in the order in which they are tried.
        compute_dtype: float16 or bfloat16 where the model computes in it, as far as known; else None.
        loss_scale: S, 0-dim float64, for float16.
        tangent_size: T, 0-dim float64, for float16.
        known_maps: methods and functions that the guard has found right; it adds to them.
        compares: whether the guard compares in this step in any case.
        is_first: whether it is the first step, in which the host may read a value.
        preconditioner: P; None where P = 1.
        processes: that train the parameters together; None: this one alone.
    """

    settings: Settings
    params: list[Tensor]
    z: list[Tensor]
    z_dot_z: Tensor
    methods: Sequence[str]
    compute_dtype: torch.dtype | None
    loss_scale: Tensor
    tangent_size: Tensor
    known_maps: guard.Known
    compares: bool
    is_first: bool
    preconditioner: Preconditioner | None
    processes: Processes | None

    @property
    def guarded(self) -> bool:
        """Whether the guard looks; debug mode does so itself."""
        return not self.settings.debug

    @cached_property
    def hooked(self) -> bool:
        """Whether hooks may alter gradients."""
        return any(has_gradient_hooks(p) for p in self.params)

    @cached_property
    def precise(self) -> bool:
        """Whether gradients are not rounded to less than float32."""
        return all(p.dtype in (torch.float32, torch.float64) for p in self.params)

    def wide(self, linear: LinearMap | Pullback, outputs: Tensor, is_scaled: bool) -> WideLinearMap:
        """Return a map as the step sees it, with the loss scale or without."""
        if is_scaled:
            return ScaledLinearMap(linear, outputs.dtype, self.loss_scale, self.tangent_size)
        return WideLinearMap(linear, outputs.dtype)

    def loss_model(self, loss_fn: LossFn, outputs: Tensor, linear: WideLinearMap, replay: Replay) -> LossModel:
        """Return the quadratic model of the loss at the outputs."""
        seen = at_least_float32(outputs)
        settings = self.settings
        hidden = [*self.params, *linear.without_graph()]
        return LossModel(lambda out: replay.first(lambda: loss_fn(out)), seen, settings.sign, hidden, settings.backend)

    def dots(self, linear: WideLinearMap, r: list[Tensor]) -> Tensor:
        """Return `[z·z, z·r, r·r]`, taken directly."""
        return linear.unscaled_dots(ops.dots(self.z, r, backend=self.settings.backend))


class QuadraticTerms(NamedTuple):
    """What a step has measured, before anything is changed.

    Attributes:
        loss: of the whole batch, 0-dim, detached; in float64 where it is a mean.
        loss_dtype: in which it is returned.
        outputs: of the model for each part of it, detached.
        u: P⁻¹Jᵀc, of the parameters' shapes; in float16 there is an `overflow`, and where P = 1 it is multiplied by the
            loss scale.
        products: float64[5], of the unscaled u.
        dots: float64[3], likewise; None where the adjoint identities give them.
        overflow: what float16 could not hold.
        method: by which the model was linearized.
        compute_dtype: the half precision that the model computes in, or None.
        comparison: of the products with dot products taken directly; None where the step's number asks for none.
        loss_size: of a loss that may be concave somewhere, as `LossModel` has it; None of others.
        direction: what P is to learn from; None where P = 1.
        mean: by which numbers of the parts become those of the whole.
    """

    loss: Tensor
    loss_dtype: torch.dtype
    outputs: list[Tensor]
    u: list[Tensor]
    products: Tensor
    dots: Tensor | None
    overflow: Overflow | None
    method: str
    compute_dtype: torch.dtype | None
    comparison: guard.Comparison | None
    loss_size: Tensor | None
    direction: Direction | None
    mean: BatchMean


class FullGradient(NamedTuple):
    """Jᵀg of a full batch whose curvature is taken from a part of it.

    Attributes:
        tensors: of the parameters' shapes.
        is_scaled: whether they are multiplied by the loss scale.
        compute_dtype: the half precision that the model computes in, or None.
    """

    tensors: list[Tensor]
    is_scaled: bool
    compute_dtype: torch.dtype | None
