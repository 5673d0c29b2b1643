"""A batch in parts, in this process and perhaps in others, and means over all of them: Σ wᵢ xᵢ / Σ wᵢ.

The loss of the whole is L = Σ wᵢ Lᵢ / Σ wᵢ, and so are its gradient and its products with the curvature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from curveball_fused._torch_private import foreach_add_, foreach_mul, foreach_mul_
from curveball_fused.backends.dtypes import at_least_float32
from curveball_fused.curvature import ModelFn
from curveball_fused.data_parallel import GradientSum, Processes
from curveball_fused.losses import LossFn

Weight = float | Tensor


class Part(NamedTuple):
    """One part of a batch.

    Attributes:
        model_fn: called without arguments, returns the predictions.
        loss_fn: maps them to the scalar loss.
        weight: called after a run of the model, returns w; a tensor is 0-dim.
    """

    model_fn: ModelFn
    loss_fn: LossFn
    weight: Callable[[], Weight] = lambda: 1.0


def in_share(numbers: Tensor, share: Weight) -> Tensor:
    """Return share · numbers; zero at the share zero, whatever they are."""
    if isinstance(share, Tensor):
        return torch.where(share == 0, 0, share * numbers)
    return share * numbers if share else torch.zeros_like(numbers)


def dtype_of(losses: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype in which the loss of the whole is returned, that of the parts; its sum is taken in float64."""
    return reduce(torch.promote_types, [loss.dtype for loss in losses])


class BatchMean:
    """The mean over the parts of a batch, in all processes.

    The parts come in their order: each is weighed when its model has run, and then pulled back.

    Args:
        params: the parameters.
        count: of the parts in this process.
        processes: that train the parameters; None: this one alone.

    Attributes:
        is_plain: whether there is one part, in one process, whose mean it is itself.
    """

    def __init__(self, params: Sequence[Tensor], count: int, processes: Processes | None) -> None:
        self.is_plain = count == 1 and processes is None
        self._params, self._count, self._processes = params, count, processes
        self._weights: list[Weight] = []
        self._beside: list[Tensor] = []
        self._pulled_back = 0
        self._gradient: list[Tensor] = []

    def weigh(self, part: Part, beside: Tensor | None = None) -> None:
        """Note the weight of the part whose model has run last.

        Args:
            part: the part.
            beside: float64 numbers of the part, whose mean `beside` returns when all parts have been weighed. In all
                parts of all processes, or in none.
        """
        if beside is not None:
            self._beside.append(beside)
        weight = 1.0 if self.is_plain else part.weight()
        if isinstance(weight, Tensor) and weight.device == self._params[0].device:
            wide = weight.detach().reshape(()).double()  # those of few bits, and bools, do not add up
            self._weights.append(torch.where(wide < 0, math.nan, wide))  # by which the step is skipped
        else:
            number = float(weight)
            self._weights.append(math.nan if number < 0 else number)

    def weighed(self, c: Tensor) -> Tensor:
        """Return the cotangent of the part that was weighed last: zero at the weight zero, whatever its loss is.

        That of a part without samples, or of tokens of which none counts, is no number.
        """
        weight = self._weights[-1]
        if isinstance(weight, Tensor):
            return torch.where(weight == 0, 0, c)
        return c if weight else torch.zeros_like(c)

    def pull_back(self, vjp: Callable[[], list[Tensor]], factor: Callable[[], Tensor] | None = None) -> None:
        """Take in the Jᵀc of the next part, which `vjp` computes; that of the last one completes the gradient.

        Args:
            vjp: returns Jᵀc.
            factor: called when all parts have been weighed, returns by what the mean is to be multiplied.
        """
        i = self._pulled_back
        self._pulled_back += 1
        if self.is_plain:
            self._gradient = vjp()
        elif self._pulled_back < self._count:
            self._add(vjp(), self._weights[i])
        else:
            self._complete(vjp, self.shares[i], None if factor is None else factor())

    def _complete(self, vjp: Callable[[], list[Tensor]], share: Weight, factor: Tensor | None) -> None:
        """Take in the last part."""
        so_far = self._gradient or None
        if so_far is not None:
            foreach_mul_(so_far, 1 / self._total)
        if self._processes is None:
            self._add(vjp(), share)
            if factor is not None:
                foreach_mul_(self._gradient, factor)
            return
        if factor is not None:  # all of it goes into the sum that is sent
            share = share * factor
            if so_far is not None:
                foreach_mul_(so_far, factor)
        with GradientSum(self._processes, self._params, share, so_far) as total:
            r = vjp()
        self._gradient = total.of(r)

    def gradient(self) -> list[Tensor]:
        """Return the mean of Jᵀc; in one process in float32 at least where there are several parts."""
        return self._gradient

    def sum(self, numbers: Sequence[Tensor]) -> Tensor:
        """Return the sum over all parts, each of which has a float64 vector of one length."""
        own = numbers[0] if len(numbers) == 1 else torch.stack(list(numbers)).sum(dim=0)
        return own if self._processes is None else self._processes.sum(own)

    def of_losses(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the mean of the losses of all parts, 0-dim."""
        if self.is_plain:
            return losses[0]
        return self.sum([in_share(loss.double(), share) for loss, share in zip(losses, self.shares, strict=True)])

    @cached_property
    def shares(self) -> list[Weight]:
        """wᵢ / Σ w of the parts in this process, when all of them have been weighed."""
        return [1.0] if self.is_plain else [w / self._total for w in self._weights]

    def beside(self) -> Tensor | None:
        """Return the mean of the numbers that stood beside the weights; None if there were none."""
        if self.is_plain or not self._beside:
            return self._beside[0] if self._beside else None
        _, total_beside = self._totals
        return total_beside / self._total

    @property
    def _total(self) -> Weight:
        return self._totals[0]

    @cached_property
    def _totals(self) -> tuple[Weight, Tensor]:
        """Sums over all parts: of the weights, and of weights times what stood beside them."""
        own = sum(self._weights[1:], start=self._weights[0])
        pairs = zip(self._beside, self._weights, strict=True) if self._beside else ()
        weighted = [in_share(numbers, weight) for numbers, weight in pairs]
        nothing = torch.zeros(0, dtype=torch.float64, device=self._params[0].device)
        beside = torch.stack(weighted).sum(dim=0) if weighted else nothing
        if self._processes is None:
            return own if isinstance(own, Tensor) or own else math.nan, beside  # of no samples there is no mean
        total = self._processes.sum(torch.cat((nothing.new_zeros(1) + own, beside)))
        return total[0], total[1:]

    def _add(self, r: Sequence[Tensor], weight: Weight) -> None:
        if not self._gradient:
            wide = [at_least_float32(r_i) for r_i in r]
            weighted = foreach_mul(wide, weight)  # a 0-dim one has the dtype of a 0-dim weight
            self._gradient = [t.to(r_i.dtype) for t, r_i in zip(weighted, wide, strict=True)]
        elif isinstance(weight, Tensor):
            foreach_add_(self._gradient, foreach_mul([at_least_float32(r_i) for r_i in r], weight))
        else:
            foreach_add_(self._gradient, list(r), alpha=weight)
