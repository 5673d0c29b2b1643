"""float16 without underflow: what passes through the model is brought to the middle of that format's range, and back.

float16 holds 6e-5 to 65504 in full precision. The cotangent c is multiplied by a loss scale S before it is pulled back,
so that r = S Jᵀc, as `torch.amp.GradScaler` does it for gradients: S falls when r overflows, by which the step is
skipped, and grows after many steps without. The tangents z and r, which J takes in, are brought to a root mean square
T, which falls and grows in the same way, by what J makes of them. All factors are powers of two, on the device, so that
nothing is rounded that float16 would not round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from .reference import BETA, LAMBD

SCALE_SIZE = 3  # S, T, and the steps since one of them last changed
_LEAST_S, _FIRST_S, _MOST_S = 2.0**-16, 2.0**16, 2.0**24
# At the most, elements of 2^-8 of the mean are as precise as any; at the least, the mean is the smallest such number.
_LEAST_T, _MOST_T = 2.0**-14, 2.0**-6
_PATIENCE_S, _PATIENCE_T = 2000, 200


class Overflow(NamedTuple):
    """What a step found to be more than float16 holds: r; J z or J r of a finite r. 0-dim bool each."""

    r: Tensor
    tangents: Tensor


def initial(device: torch.device) -> Tensor:
    """float64 `[S, T, steps]` before the first step."""
    scale = torch.zeros(SCALE_SIZE, dtype=torch.float64, device=device)
    scale[0].fill_(_FIRST_S)
    scale[1].fill_(_MOST_T)
    return scale


def adapted(scale: Tensor, overflow: Overflow) -> Tensor:
    """The scales of the next step: S/2 or T/16 after an overflow; 2S after 2000 steps without one, 2T after 200.

    T grows sooner, as what is not a number for another reason counts as an overflow of tangents.
    """
    s, t, steps = scale.unbind()
    steps = torch.where(overflow.r | overflow.tangents, 0.0, steps + 1)
    grows_s, grows_t = steps >= _PATIENCE_S, (steps > 0) & (torch.remainder(steps, _PATIENCE_T) == 0)
    s = torch.where(overflow.r, s / 2, torch.where(grows_s, 2 * s, s)).clamp(_LEAST_S, _MOST_S)
    t = torch.where(overflow.tangents, t / 16, torch.where(grows_t, 2 * t, t)).clamp(_LEAST_T, _MOST_T)
    return torch.stack((s, t, torch.where(grows_s, 0.0, steps)))


class Stretched(NamedTuple):
    """Tangents v, and the factor (0-dim float32, a power of two) by which they have been multiplied."""

    tangents: list[Tensor]
    factor: Tensor

    def shrink(self, image: Tensor) -> Tensor:
        """J v, in float32 at least, from the image of the stretched tangents."""
        return at_least_float32(image) / self.factor


def stretched(tangents: Sequence[Tensor], squares: Tensor, size: Tensor) -> Stretched:
    """`tangents` times the power of two that brings their root mean square to about `size` (0-dim), in float32.

    Args:
        squares: their sum of squares, 0-dim; where it is zero or not finite, the factor is 1.
    """
    wanted = size / (squares / max(1, sum(t.numel() for t in tangents))).sqrt()
    factor = wanted / (2 * torch.frexp(wanted).mantissa)
    factor = torch.where(torch.isfinite(factor) & (factor > 0), factor, 1.0).float()
    return Stretched(list(torch._foreach_mul([at_least_float32(t) for t in tangents], factor)), factor)


def update_by_scaled(update: Callable[[Tensor], Tensor], scalars: Tensor, factor: Tensor) -> Tensor:
    """`update(scalars)` where its r is S r: (ρ - βλ) z - (β/S) (S r), by β/S and Sλ in the places of β and λ."""
    folded = scalars.clone()
    folded[BETA].div_(factor)
    folded[LAMBD].mul_(factor)
    return torch.cat((scalars[: LAMBD + 1], update(folded)[LAMBD + 1 :]))


def of_scaler(scaler: torch.amp.GradScaler, device: torch.device) -> Tensor:
    """S, 0-dim float64, of torch's own scaler."""
    return scaler.scale(torch.ones((), dtype=torch.float64, device=device))


def tell(scaler: torch.amp.GradScaler, optimizer: Optimizer, overflow: Tensor) -> None:
    """Has the scaler's next `update` know of an overflow, which it looks for in gradients: in that of a stand-in.

    One for each optimizer, as a scaler counts them by identity; they live as long as the scaler, which may remember
    that of an optimizer that is gone.
    """
    own = _stand_ins.setdefault(scaler, {})
    stand_in = own.get(id(optimizer))
    if stand_in is None or stand_in.param_groups[0]["params"][0].device != overflow.device:
        stand_in = own[id(optimizer)] = SGD([torch.zeros((), dtype=torch.float32, device=overflow.device)])
    stand_in.param_groups[0]["params"][0].grad = torch.where(overflow, torch.inf, 0.0).float()
    scaler.unscale_(stand_in)


def awaits_update(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Whether the scaler was told of this optimizer's last step, and not yet updated."""
    told = vars(scaler).get("_per_optimizer_states", {})  # which `update` empties
    return id(_stand_ins.get(scaler, {}).get(id(optimizer))) in told


_stand_ins: WeakKeyDictionary[torch.amp.GradScaler, dict[int, Optimizer]] = WeakKeyDictionary()


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor`; a half-precision one in float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
