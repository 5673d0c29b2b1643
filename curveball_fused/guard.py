"""The guard: whether the two Jacobian products of a step are those of one linear map.

r = Jᵀc comes from a backward pass, Jz and Jr from tangents; a step takes for granted that z·r = Jz·c and r·r = Jr·c.
A tangent that was lost on the way, a backward pass that is not the derivative, a model that is another function in each
run: all of these show as two numbers that differ. So in the first step by each method, and by each set of functions
that the model consists of, the dot products are also taken directly, and the host compares them; now and then
later steps compare them on the device, and one that fails is skipped, as a step that is not finite is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

INTERVAL = 100  # about as many steps from one comparison on the device to the next
_NAMES = ("z·r and Jz·c, of the last step's direction z", "r·r and Jr·c, of the gradient's direction r")

Known = dict[tuple[str, frozenset[str]], float]
_known: WeakKeyDictionary[Optimizer, Known] = WeakKeyDictionary()


def known_maps(optimizer: Optimizer) -> Known:
    """Return what was found right for an optimizer so far: methods, each with a model's functions, and the errors."""
    return _known.setdefault(optimizer, {})


class Comparison(NamedTuple):
    """What the direct dot products say of a step.

    Attributes:
        errors: float64[2 or 3], relative: of z·r = Jz·c, of r·r = Jr·c, and, if the model ran several times, of their
            outputs.
        tolerance: for each of them.
    """

    errors: Tensor
    tolerance: float

    def masked(self, products: Tensor) -> Tensor:
        """Return the products of the step, or NaN where a comparison has failed, by which the step is skipped."""
        return torch.where(self.failed(), torch.nan, products)

    def failed(self) -> Tensor:
        """Return whether a comparison has failed, 0-dim bool; what is not a number has not."""
        return (self.errors > self.tolerance).any()

    def worst(self) -> Tensor:
        """Return the largest error, 0-dim."""
        return self.errors.amax()

    def complaint(self) -> str:
        """Return what has failed, by how much; empty if nothing. This waits for the device."""
        errors = self.errors.tolist()
        failed = [(error, i) for i, error in enumerate(errors) if error > self.tolerance]
        if not failed:
            return ""
        error, i = max(failed)
        if i == len(_NAMES):
            what = "the runs of the model in one step return different outputs, so they are not one function"
        else:
            what = f"its Jacobian products are not each other's transpose, as {_NAMES[i]}, differ"
        return f"{what} (relative error {error:.1e}, tolerance {self.tolerance:.1e})"


def compare(
    dots: Tensor,
    of_z: Tensor,
    of_r: Tensor,
    difference_of_runs: Tensor | None,
    dtypes: Iterable[torch.dtype],
) -> Comparison:
    """Compare the dot products that follow from adjointness with those taken directly.

    Both are of the c that was pulled back, as it was rounded: what is asked is of the Jacobian, not of the loss, whose
    own products are more precise where c is a small difference, as that of a net that fits its data is.

    Args:
        dots: float64 `[z·z, z·r, r·r]`, taken directly.
        of_z: float64 `[Jz·Jz, Jz·c, c·c]`.
        of_r: float64 `[Jr·Jr, Jr·c, c·c]`.
        difference_of_runs: of the outputs, relative; None where the model ran once.
        dtypes: that the model computes in; the least precise sets the tolerance.

    Returns:
        The comparison, on the device.
    """
    image, by_adjointness, cotangent = torch.stack((of_z, of_r), dim=1)
    directly = dots[1:]
    # Where terms cancel, rounding is relative to them and not to their sum.
    terms = 0.1 * (image * cotangent).sqrt()
    scale = torch.maximum(torch.maximum(by_adjointness.abs(), directly.abs()), terms)
    difference = (by_adjointness - directly).abs()
    errors = torch.where(difference == 0, difference, difference / scale)
    at_rest = torch.stack((dots[0] == 0, dots[2] == 0))
    errors = errors.masked_fill(at_rest, 0.0)  # J 0 is zero, whatever rounding makes of it
    if difference_of_runs is not None:
        errors = torch.cat((errors, difference_of_runs.reshape(1)))
    return Comparison(errors, _tolerance(dtypes, dots.device))


def _tolerance(dtypes: Iterable[torch.dtype], device: torch.device) -> float:
    """Return the relative error that rounding may make: a wrong derivative makes a larger one, rounding much less."""
    epsilon = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    tolerance = 2 * math.sqrt(epsilon)
    return max(tolerance, _tolerance_of_products(device)) if epsilon == torch.finfo(torch.float32).eps else tolerance


def _tolerance_of_products(device: torch.device) -> float:
    """Return the error that may come of matrix products and convolutions of float32 at a lower precision."""
    # Not `allow_tf32`, which raises an error where a precision was set by its new name.
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    cpu: Any = torch.backends.mkldnn
    if device.type == "cuda":
        if cuda.matmul.fp32_precision == "tf32":
            return 3e-2  # a deep or recurrent net multiplies the rounding of each product: up to 8e-3 was seen
        return 6e-3 if "tf32" in (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) else 0.0
    precisions = (cpu.matmul.fp32_precision, cpu.conv.fp32_precision, cpu.rnn.fp32_precision)
    if "bf16" in precisions:
        return 2 * math.sqrt(torch.finfo(torch.bfloat16).eps)
    return 3e-2 if "tf32" in precisions else 0.0
