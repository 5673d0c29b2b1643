"""What the optimizer remembers from step to step: z for each parameter, and numbers that belong to all of them.

`Optimizer.state` has parameters as keys and tensors as values, which torch's tools save, load and move. Each z is under
its parameter; the numbers of all parameters are beside the z of the first that is trained: `scalars` (see
`backends.scalars`), `scale` (see `loss_scale`) and `guard` (see `guard`), which steps replace, and `history`, which has
a row of scalars for each of the last steps.

What the host decides is there too, as integers on the CPU: `step`, how many there were; `active`, a checksum of which
parameters z·z is the sum over; `method`, how the model was linearized; `compute_dtype`, float16 or bfloat16 if the
model computes in it. No step reads them: in use is a dictionary of the same names, `shared`, with Python's own objects
for these four, and each step writes it to the state. (`written` are the integers that the state has.)
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from curveball_fused import ops
from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.scalars import DIRECTION_DAMPING, LAMBD, LOSS, RATIO, SCALARS, Z_DOT_Z
from curveball_fused.preconditioners import NAMES, SQUARE_AVERAGE, fresh_state, has_block, shapes
from curveball_fused.settings import Settings

REPLACED = ("scalars", "scale", "guard")
HISTORY = 1024  # rows
SHAPES = {
    "scalars": (len(SCALARS),),
    "scale": (3,),  # loss scale S, size T of tangents, and the steps since one of them last changed
    "guard": (2,),  # steps that it has skipped, and the largest error when it last compared
    "history": (HISTORY, len(SCALARS)),
}
FIRST_LOSS_SCALE, FIRST_TANGENT_SIZE = 2.0**16, 2.0**-6
ON_HOST = ("step", "active", "method", "compute_dtype")
_NONE_YET = -1  # no checksum
# Their places are what checkpoints hold.
_METHODS = (None, "linearize", "forward", "double_backward", "compiled", "linearize_operators")
_COMPUTE_DTYPES = (None, torch.float16, torch.bfloat16)
_INTERNAL = (
    *("z_dot_z", "linear_term", "quadratic_term"),
    *("direction_damping", "average_beta", "average_rho", "solves", "gathered"),
)
_FORMER_KEY = "curveball"  # under which the numbers of all parameters once were
_FORMER_SCALARS = 11  # those before the direction damping, which was λ then
_FORMER_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def fresh(lambd: float, device: torch.device) -> dict[str, Any]:
    """Return the numbers of all parameters as before the first step."""
    scalars = torch.zeros(len(SCALARS), dtype=torch.float64, device=device)
    for index, value in ((LAMBD, lambd), (RATIO, torch.nan), (LOSS, torch.nan)):
        scalars[index].fill_(value)  # an assignment would copy the number from the host
    scale = torch.zeros(SHAPES["scale"], dtype=torch.float64, device=device)
    for index, value in enumerate((FIRST_LOSS_SCALE, FIRST_TANGENT_SIZE)):
        scale[index].fill_(value)
    return dict(
        scalars=scalars,
        scale=scale,
        guard=torch.zeros(SHAPES["guard"], dtype=torch.float64, device=device),
        history=torch.zeros(HISTORY, len(SCALARS), dtype=torch.float64, device=device),
        step=0,
        active=_NONE_YET,
        method=None,
        compute_dtype=None,
        written={},
    )


def is_current(state: dict[Any, Any], everything: Sequence[Tensor], shared: dict[str, Any] | None) -> bool:
    """Return whether steps were taken and the state is as the last one has left it, not loaded or cleared since."""
    if not everything or shared is None or shared["step"] == 0:
        return False
    return state.get(_holder(everything), {}).get("scalars") is shared["scalars"]


@torch.inference_mode(False)  # in which steps write to it
def make(
    state: dict[Any, Any],
    everything: Sequence[Tensor],
    shared: dict[str, Any] | None,
    lambd: float,
    preconditioner: str | None,
) -> dict[str, Any]:
    """Make the state that is missing, bring the rest to where the parameters are, and return the numbers of all.

    A z of another shape than its parameter is begun anew. Before the first step λ is that of the options, which may
    have changed.

    Args:
        state: the optimizer's.
        everything: all its parameters, at least one.
        shared: the numbers of all parameters as they were last in use, if they were.
        lambd: the first λ.
        preconditioner: the optimizer's option.

    Returns:
        `shared`, or what takes its place if the state is another one by now.
    """
    for p in everything:
        if p.requires_grad and not is_lazy(p):
            _complete(state[p], p, preconditioner)
    holder = _holder(everything)
    found = next((p for p in everything if "scalars" in state.get(p, {})), None)
    if found is None:
        shared = fresh(lambd, holder.device)
    elif shared is None or shared["scalars"] is not state[found]["scalars"]:
        shared = _read(state[found])
    if found is not None and found is not holder:
        _remove(state, found)
    for name in SHAPES:
        shared[name] = shared[name].to(holder.device)
    if shared["step"] == 0:
        shared["scalars"][LAMBD].fill_(lambd)
    _write(state[holder], shared)
    return shared


def prepare(
    state: dict[Any, Any],
    everything: Sequence[Tensor],
    shared: dict[str, Any] | None,
    active: int,
    settings: Settings,
) -> dict[str, Any]:
    """Return the numbers of all parameters, and have state for each that requires a gradient, ready for a step.

    Both follow a model that was converted or moved; z·z is summed anew where others than in the last step are trained,
    or where a z was missing. The arguments are those of `make`, `active`, the checksum of this step, and the options.
    """
    params = [p for p in everything if p.requires_grad]
    if not _is_ready(state, params[0], shared, active):
        shared = make(state, everything, shared, settings.lambd, settings.preconditioner)
    assert shared is not None
    is_summed = shared["active"] == active
    for p in params:
        z = state[p].get("z")
        is_summed &= z is not None
        if z is None or _is_elsewhere(z, p) or (settings.preconditioner and SQUARE_AVERAGE not in state[p]):
            _complete(state[p], p, settings.preconditioner)
    if not is_summed:
        z = [state[p]["z"] for p in params]
        scalars = shared["scalars"].clone()
        scalars[Z_DOT_Z] = ops.dots(z, z, backend=settings.backend)[0]
        shared |= {"scalars": scalars, "active": active}
        _write(state[params[0]], shared)
    return shared


def noted_comparison(guard: Tensor, failed: Tensor, worst: Tensor) -> Tensor:
    """Return the guard's numbers after one more comparison."""
    return torch.stack((guard[0] + failed, worst))


def checksum(trained: Sequence[bool]) -> int:
    """Return a number that tells apart which parameters are trained."""
    return zlib.crc32(bytes(trained))


def finish_step(state: dict[Any, Any], everything: Sequence[Tensor], shared: dict[str, Any]) -> None:
    """Count the step, add its row to the history, and write the numbers of all parameters to the state."""
    shared["history"][shared["step"] % HISTORY].copy_(shared["scalars"])
    shared["step"] += 1
    _write(state[_holder(everything)], shared)


def restore(state: dict[Any, Any], saved: dict[Any, Any], params: dict[Any, Tensor]) -> None:
    """Put what a checkpoint has in the place of fresh state, in copies.

    Args:
        state: the optimizer's.
        saved: that of the checkpoint.
        params: the optimizer's parameters, by the checkpoint's names of them.
    """
    for name, p in params.items():
        entry = saved.get(name, {})
        if "scalars" in entry:
            _remove(state, _holder(list(params.values())))
        for block in NAMES:  # of a metric that the checkpoint has not
            state.get(p, {}).pop(block, None)
        for key, value in entry.items():
            if key == "z":
                state[p][key] = zeros_like(p).copy_(value)
            elif isinstance(value, Tensor):
                state[p][key] = value.to("cpu" if key in ON_HOST else p.device, copy=True)
            else:
                state[p][key] = value
    state.update({name: entry for name, entry in saved.items() if name not in params})  # the user's own, as in torch


def _holder(everything: Sequence[Tensor]) -> Tensor:
    """Return the parameter whose state has the numbers of all."""
    return next((p for p in everything if p.requires_grad), everything[0])


def _is_ready(state: dict[Any, Any], holder: Tensor, shared: dict[str, Any] | None, active: int) -> bool:
    """Return whether the numbers of all parameters are those of the state, where they belong, for these parameters."""
    if shared is None or shared["active"] != active:
        return False
    return state[holder].get("scalars") is shared["scalars"] and shared["scalars"].device == holder.device


def _complete(entry: dict[str, Tensor], p: Tensor, preconditioner: str | None) -> None:
    """Make what the state of a parameter lacks, and bring the rest to where the parameter is."""
    z = entry.get("z")
    if z is None or z.shape != p.shape:
        entry["z"] = zeros_like(p)
    elif _is_elsewhere(z, p) or z.stride() != p.stride():
        entry["z"] = zeros_like(p).copy_(z)
    if preconditioner is None:
        return
    if not has_block(entry, p):
        entry.update(fresh_state(p))
    for name in shapes(p):
        t = entry[name]
        entry[name] = t.to(entry["z"])
        if name.endswith("_basis") and torch.finfo(t.dtype).eps > torch.finfo(entry["z"].dtype).eps:
            entry[name] = torch.linalg.qr(entry[name])[0].contiguous()  # as orthogonal as the new precision has it


def _is_elsewhere(z: Tensor, p: Tensor) -> bool:
    return z.dtype != compute_dtype(p.dtype) or z.device != p.device


def _read(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of all parameters from the state that has them."""
    shared: dict[str, Any] = {name: entry[name] for name in SHAPES}
    step, active, method, dtype = (int(entry[name]) for name in ON_HOST)
    shared |= dict(step=step, active=active, method=_METHODS[method], compute_dtype=_COMPUTE_DTYPES[dtype])
    return shared | {"written": _numbers(shared)}


def _write(entry: dict[str, Any], shared: dict[str, Any]) -> None:
    """Write the numbers of all parameters to the state that has them; of those of the host what has changed."""
    entry.update({name: shared[name] for name in SHAPES})
    numbers, written = _numbers(shared), shared["written"]
    for name, number in numbers.items():
        if name not in entry:
            entry[name] = torch.tensor(number, device="cpu")
        elif number != written.get(name):
            entry[name].fill_(number)
    shared["written"] = numbers


def _numbers(shared: dict[str, Any]) -> dict[str, int]:
    """Return what the host decides as integers."""
    method, dtype = _METHODS.index(shared["method"]), _COMPUTE_DTYPES.index(shared["compute_dtype"])
    return dict(step=shared["step"], active=shared["active"], method=method, compute_dtype=dtype)


def _remove(state: dict[Any, Any], p: Tensor) -> None:
    """Remove the numbers of all parameters from the state of `p`."""
    state[p] = {name: value for name, value in state[p].items() if name not in (*SHAPES, *ON_HOST)}
    if not state[p]:
        del state[p]


def history_rows(shared: dict[str, Any]) -> Tensor:
    """Return all rows of the history that were written, oldest first, on the CPU, by one copy."""
    count = min(shared["step"], HISTORY)
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
    """Return a `state_dict`, or what was pickled, of an earlier version as one of today; anything else as it is."""
    state = state_dict.get("state") if isinstance(state_dict, dict) else None
    if not isinstance(state, dict):
        return state_dict
    if isinstance(state.get(_FORMER_KEY), dict):
        state_dict = _with_numbers_under_a_parameter(state_dict)
    entries = {name: _with_more_scalars(entry) for name, entry in state_dict["state"].items()}
    return state_dict | {"state": defaultdict(dict, entries)}


def _with_numbers_under_a_parameter(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a `state_dict` with the numbers of all parameters beside a z, where they were under a key of their own."""
    former = state_dict["state"][_FORMER_KEY]
    shared: dict[str, Any] = {"guard": torch.zeros(SHAPES["guard"], dtype=torch.float64)} | former
    if {"way", "half"} <= shared.keys():
        shared |= {"method": shared.pop("way"), "compute_dtype": _FORMER_DTYPES.get(shared.pop("half"))}
    names = [name for group in state_dict["param_groups"] for name in group["params"]]
    if shared.keys() >= set(ON_HOST):
        trained = set(shared["active"])
        shared["active"] = checksum([i in trained for i in range(len(names))])
        shared |= {name: torch.tensor(number, device="cpu") for name, number in _numbers(shared).items()}
    state = {name: entry for name, entry in state_dict["state"].items() if name != _FORMER_KEY}
    state[names[0]] = state.get(names[0], {}) | shared
    return state_dict | {"state": state}


def _with_more_scalars(entry: Any) -> Any:
    """Return the state of a parameter with zeros for the scalars that came later, and without averages of systems."""
    if not isinstance(entry, dict) or "scalars" not in entry:
        return entry
    entry = {name: value for name, value in entry.items() if name != "system"}
    for name in ("scalars", "history"):
        former = entry.get(name)
        if isinstance(former, Tensor) and former.shape[-1:] == (_FORMER_SCALARS,):
            entry[name] = former.new_zeros(*former.shape[:-1], len(SCALARS))
            entry[name][..., :_FORMER_SCALARS] = former
            entry[name][..., DIRECTION_DAMPING] = former[..., LAMBD]
    return entry


def zeros_like(p: Tensor) -> Tensor:
    """Return state for `p`: its layout, and at least float32."""
    return torch.zeros_like(p, dtype=compute_dtype(p.dtype), requires_grad=False)
