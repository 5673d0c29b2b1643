"""float16 without underflow: what passes through the model is brought to the middle of that format's range, and back.

float16 holds 6e-5 to 65504 in full precision. The cotangent c is multiplied by a loss scale S before it is pulled back,
so that r = S Jᵀc, as `torch.amp.GradScaler` does it for gradients: S falls when r overflows, by which the step is
skipped, and grows after many steps without. The tangents z and r, which J takes in, have a scale of their own: their
root mean square is known, and J is linear. All scales are powers of two, on the device, so that nothing is rounded that
float16 would not round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from .reference import BETA, LAMBD

SCALE_SIZE = 2  # S, and the steps since it last changed
_FIRST, _MOST = 2.0**16, 2.0**24
_PATIENCE = 2000
_SIZE_OF_TANGENTS = 0.125


def initial(device: torch.device) -> Tensor:
    """float64 `[S, steps]` before the first step."""
    scale = torch.zeros(SCALE_SIZE, dtype=torch.float64, device=device)
    scale[0] = _FIRST
    return scale


def adapted(scale: Tensor, overflow: Tensor) -> Tensor:
    """The scale of the next step: half after an overflow (0-dim bool), double after 2000 steps without."""
    factor, steps = scale.unbind()
    steps = torch.where(overflow, 0.0, steps + 1)
    grown = torch.where(steps >= _PATIENCE, (2 * factor).clamp(max=_MOST), factor)
    factor = torch.where(overflow, (factor / 2).clamp(min=1.0), grown)
    return torch.stack((factor, torch.where(steps >= _PATIENCE, 0.0, steps)))


class Stretched(NamedTuple):
    """Tangents v, and the factor (0-dim float32, a power of two) by which they have been multiplied."""

    tangents: list[Tensor]
    factor: Tensor

    def shrink(self, image: Tensor) -> Tensor:
        """J v, in float32 at least, from the image of the stretched tangents."""
        return at_least_float32(image) / self.factor


def stretched(tangents: Sequence[Tensor], squares: Tensor) -> Stretched:
    """`tangents` times the power of two that makes their root mean square about 1/8.

    Args:
        squares: their sum of squares, 0-dim; where it is zero or not finite, the factor is 1.
    """
    size = (squares / max(1, sum(t.numel() for t in tangents))).sqrt()
    wanted = _SIZE_OF_TANGENTS / size
    mantissa = torch.frexp(wanted).mantissa
    factor = wanted / (2 * mantissa)
    factor = torch.where(torch.isfinite(factor) & (factor > 0), factor, 1.0).float()
    return Stretched(list(torch._foreach_mul(list(tangents), factor)), factor)


def update_by_scaled(update: Callable[[Tensor], Tensor], scalars: Tensor, factor: Tensor) -> Tensor:
    """`update(scalars)` where its r is S r: (ρ - βλ) z - (β/S) (S r), by β/S and Sλ in the places of β and λ."""
    folded = scalars.clone()
    folded[BETA] /= factor
    folded[LAMBD] *= factor
    return torch.cat((scalars[: LAMBD + 1], update(folded)[LAMBD + 1 :]))


def overflowed(loss: Tensor, products: Tensor, dots: Tensor) -> Tensor:
    """Whether r, but not yet Jz, is more than float16 holds; 0-dim bool."""
    before, after = torch.isfinite(products[:2]).all(), torch.isfinite(torch.cat((products[2:], dots))).all()
    return torch.isfinite(loss) & before & ~after


def of_scaler(scaler: torch.amp.GradScaler, device: torch.device) -> Tensor:
    """S, 0-dim float64, of torch's own scaler."""
    return scaler.scale(torch.ones((), dtype=torch.float64, device=device))


def tell(scaler: torch.amp.GradScaler, optimizer: Optimizer, overflow: Tensor) -> None:
    """Has the scaler's next `update` know of an overflow, which it looks for in gradients: in that of a stand-in.

    One for each optimizer, as a scaler counts them by identity.
    """
    if optimizer not in _stand_ins:
        _stand_ins[optimizer] = SGD([torch.zeros((), device=overflow.device)])
    stand_in = _stand_ins[optimizer]
    stand_in.param_groups[0]["params"][0].grad = torch.where(overflow, torch.inf, 0.0)
    scaler.unscale_(stand_in)


_stand_ins: WeakKeyDictionary[Optimizer, Optimizer] = WeakKeyDictionary()


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor`; a half-precision one in float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
