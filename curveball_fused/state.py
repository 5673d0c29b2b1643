"""What the optimizer remembers from step to step: z for each parameter, and one dictionary that belongs to all of them.

The numbers of that dictionary live on the device, and each step replaces them: `scalars` (see `reference.SCALARS`),
`system` (see `economy`) and `scale` (see `loss_scale`). `history` has a row of scalars for each of the last steps. What
the host decides is plain Python: `step`, how many there were; `active`, which parameters are trained; `way` and `half`,
how the model was followed and in which half precision it computes, if in any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import economy, loss_scale, ops
from .reference import LAMBD, LOSS, RATIO, SCALARS, Z_DOT_Z

SHARED = "curveball"  # its key in `Optimizer.state`
REPLACED = ("scalars", "system", "scale")
HISTORY = 1024  # rows
SHAPES = {
    "scalars": (len(SCALARS),),
    "system": (economy.SYSTEM_SIZE,),
    "scale": (loss_scale.SCALE_SIZE,),
    "history": (HISTORY, len(SCALARS)),
}
HOSTS = ("step", "active", "way", "half")
_INTERNAL = ("z_dot_z", "slope", "bend")


def fresh(lambd: float, device: torch.device) -> dict[str, Any]:
    """The dictionary before the first step."""
    scalars = torch.zeros(len(SCALARS), dtype=torch.float64, device=device)
    for index, value in ((LAMBD, lambd), (RATIO, torch.nan), (LOSS, torch.nan)):
        scalars[index].fill_(value)  # an assignment would copy the number from the host
    return dict(
        scalars=scalars,
        system=economy.unknown(device),
        scale=loss_scale.initial(device),
        history=torch.zeros(HISTORY, len(SCALARS), dtype=torch.float64, device=device),
        step=0,
        active=[],
        way=None,
        half="",
    )


def prepare(state: dict[Any, Any], everything: Sequence[Tensor], lambd: float, backend: str) -> dict[str, Any]:
    """The dictionary for all, and z for each parameter that requires a gradient, made on first use.

    Both follow a model that was converted or moved; z·z is summed anew where others than in the last step are trained.
    """
    params = [p for p in everything if p.requires_grad]
    device = params[0].device
    for p in params:
        z = state[p].get("z")
        if z is None or z.dtype != state_dtype(p) or z.device != p.device:
            state[p]["z"] = zeros_like(p) if z is None else zeros_like(p).copy_(z)
    if SHARED not in state:
        state[SHARED] = fresh(lambd, device)
    shared: dict[str, Any] = state[SHARED]
    for name in SHAPES:
        shared[name] = shared[name].to(device)
    active = [i for i, p in enumerate(everything) if p.requires_grad]
    if active != shared["active"]:
        z = [state[p]["z"] for p in params]
        scalars = shared["scalars"].clone()
        scalars[Z_DOT_Z] = ops.dots(z, z, backend=backend)[0]
        shared |= {"scalars": scalars, "active": active}
    return shared


def finish_step(shared: dict[str, Any]) -> None:
    """Counts the step and adds its row to the history."""
    shared["history"][shared["step"] % HISTORY].copy_(shared["scalars"])
    shared["step"] += 1


def rows(shared: dict[str, Any], n: int) -> Tensor:
    """The last `n` rows of the history, or as many as there are, oldest first, on the CPU, by one copy."""
    count = min(n, shared["step"], HISTORY)
    order = [i % HISTORY for i in range(shared["step"] - count, shared["step"])]
    everything: Tensor = shared["history"].cpu()
    return everything[order]


def figures(scalars: Tensor, sign: float) -> dict[str, Tensor]:
    """The values that mean something to a user, by name, from scalars in the last dimension."""
    named = {name: scalars[..., i].clone() for i, name in enumerate(SCALARS) if name not in _INTERNAL}
    named["loss"] *= sign
    for name in ("beta", "rho"):
        named[name] = named[name].nan_to_num(nan=0.0)
    return named


def zeros_like(p: Tensor) -> Tensor:
    """State for `p`: its layout, and at least float32."""
    return torch.zeros_like(p, dtype=state_dtype(p), requires_grad=False)


def state_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32
