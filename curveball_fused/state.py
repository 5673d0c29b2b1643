"""What the optimizer remembers from step to step: z for each parameter, and one dictionary that belongs to all of them.

The numbers of that dictionary live on the device, and each step replaces them: `scalars` (see `backends.scalars`),
`system` (see `averaging`), `scale` (see `loss_scale`) and `guard` (see `guard`). `history` has a row of scalars for each of the last steps.
What the host decides is plain Python: `step`, how many there were; `active`, which parameters are trained; `method`,
how the model was linearized; `compute_dtype`, float16 or bfloat16 if the model computes in it, else None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curveball_fused import ops
from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.scalars import LAMBD, LOSS, RATIO, SCALARS, Z_DOT_Z

SHARED = "curveball"  # its key in `Optimizer.state`
REPLACED = ("scalars", "system", "scale", "guard")
HISTORY = 1024  # rows
SHAPES = {
    "scalars": (len(SCALARS),),
    "system": (9,),  # the average of products and dots, and the weight that it has gathered
    "scale": (3,),  # loss scale S, size T of tangents, and the steps since one of them last changed
    "guard": (2,),  # steps that it has skipped, and the largest error when it last compared
    "history": (HISTORY, len(SCALARS)),
}
FIRST_LOSS_SCALE, FIRST_TANGENT_SIZE = 2.0**16, 2.0**-6
ON_HOST = ("step", "active", "method", "compute_dtype")
_INTERNAL = ("z_dot_z", "linear_term", "quadratic_term")
_FORMER_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def fresh(lambd: float, device: torch.device) -> dict[str, Any]:
    """Return the dictionary as before the first step."""
    scalars = torch.zeros(len(SCALARS), dtype=torch.float64, device=device)
    for index, value in ((LAMBD, lambd), (RATIO, torch.nan), (LOSS, torch.nan)):
        scalars[index].fill_(value)  # an assignment would copy the number from the host
    scale = torch.zeros(SHAPES["scale"], dtype=torch.float64, device=device)
    for index, value in enumerate((FIRST_LOSS_SCALE, FIRST_TANGENT_SIZE)):
        scale[index].fill_(value)
    return dict(
        scalars=scalars,
        system=torch.zeros(SHAPES["system"], dtype=torch.float64, device=device),
        scale=scale,
        guard=torch.zeros(SHAPES["guard"], dtype=torch.float64, device=device),
        history=torch.zeros(HISTORY, len(SCALARS), dtype=torch.float64, device=device),
        step=0,
        active=[],
        method=None,
        compute_dtype=None,
    )


def prepare(state: dict[Any, Any], everything: Sequence[Tensor], lambd: float, backend: str) -> dict[str, Any]:
    """Return the dictionary for all; make it, and z for each parameter that requires a gradient, on first use.

    Both follow a model that was converted or moved; z·z is summed anew where others than in the last step are trained.
    """
    params = [p for p in everything if p.requires_grad]
    device = params[0].device
    for p in params:
        z = state[p].get("z")
        if z is None or z.dtype != compute_dtype(p.dtype) or z.device != p.device:
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


def noted_comparison(guard: Tensor, failed: Tensor, worst: Tensor) -> Tensor:
    """Return the guard's numbers after one more comparison."""
    return torch.stack((guard[0] + failed, worst))


def finish_step(shared: dict[str, Any]) -> None:
    """Count the step and add its row to the history."""
    shared["history"][shared["step"] % HISTORY].copy_(shared["scalars"])
    shared["step"] += 1


def history_rows(shared: dict[str, Any], n: int) -> Tensor:
    """Return the last `n` rows of the history, or as many as there are, oldest first, on the CPU, by one copy."""
    count = min(n, shared["step"], HISTORY)
    order = [i % HISTORY for i in range(shared["step"] - count, shared["step"])]
    everything: Tensor = shared["history"].cpu()
    return everything[order]


def stats_of(scalars: Tensor, sign: float) -> dict[str, Tensor]:
    """Return the values that mean something to a user, by name, from scalars in the last dimension."""
    named = {name: scalars[..., i].clone() for i, name in enumerate(SCALARS) if name not in _INTERNAL}
    named["loss"] *= sign
    for name in ("beta", "rho"):
        named[name] = named[name].nan_to_num(nan=0.0)
    return named


def upgraded(state_dict: Any) -> Any:
    """Return a `state_dict` of an earlier version with today's names; anything else as it is."""
    shared = state_dict.get("state", {}).get(SHARED) if isinstance(state_dict, dict) else None
    if not isinstance(shared, dict) or "guard" in shared:
        return state_dict
    rest = shared | {"guard": torch.zeros(SHAPES["guard"], dtype=torch.float64)}
    if {"way", "half"} <= shared.keys():
        rest |= {"method": rest.pop("way"), "compute_dtype": _FORMER_DTYPES.get(rest.pop("half"))}
    return state_dict | {"state": state_dict["state"] | {SHARED: rest}}


def zeros_like(p: Tensor) -> Tensor:
    """Return state for `p`: its layout, and at least float32."""
    return torch.zeros_like(p, dtype=compute_dtype(p.dtype), requires_grad=False)
