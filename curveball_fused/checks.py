"""Checks of what users give to the optimizer: refusals that say what to do, before anything is changed."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from curveball_fused._torch_private import has_gradient_hooks, is_sharded
from curveball_fused.backends import BACKENDS
from curveball_fused.backends.scalars import GATHERED
from curveball_fused.curvature import AUTO
from curveball_fused.loss_scale import awaits_update
from curveball_fused.preconditioners import SQUARE_AVERAGE
from curveball_fused.replay.memory import span
from curveball_fused.settings import DIRECTIONS, PER_GROUP, PRECONDITIONERS
from curveball_fused.state import HISTORY, ON_HOST, SHAPES
from curveball_fused.user_warnings import announce

CURVATURES = ("auto", *AUTO)
_threaded_process: int | None = None  # the first process, of this one and those it was forked from, to step on threads


def hyper_parameters(given: dict[str, Any]) -> None:
    """Raise ValueError or TypeError for an option that is out of range, NaN or of the wrong type."""
    group_values(given)
    for name, low, high in (("beta", 0.0, math.inf), ("rho", 0.0, 1.0)):
        if given[name] is not None:
            _number(name, given[name], low, high, ", or None to solve for it")
    _number("lambd", given["lambd"], 0.0, math.inf)
    _number("lambda_factor", given["lambda_factor"], 0.0, 1.0, low_open=True)
    _number("lambda_low", given["lambda_low"], -math.inf, math.inf)
    _number("lambda_high", given["lambda_high"], given["lambda_low"], math.inf)
    _number("lambda_min", given["lambda_min"], 0.0, math.inf, low_open=True)
    _number("lambda_max", given["lambda_max"], given["lambda_min"], math.inf)
    if given["auto_lambda"]:
        hint = ", between lambda_min and lambda_max, since auto_lambda is on"
        _number("lambd", given["lambd"], given["lambda_min"], given["lambda_max"], hint)
    for name, unit in (("lambda_interval", "solves"), ("solve_interval", "steps")):
        if not isinstance(given[name], int) or isinstance(given[name], bool) or given[name] < 1:
            raise ValueError(f"{name} must be a whole number of {unit}, at least 1; got {given[name]!r}.")
    solve_interval(given["solve_interval"], given["direction"])
    _number("average", given["average"], 0.0, 1.0 - 1e-6, ", the part of the old value that is kept")
    for name, allowed in (("curvature", CURVATURES), ("backend", BACKENDS), ("direction", DIRECTIONS)):
        if given[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {given[name]!r}.")
    for name in ("auto_lambda", "maximize", "compile", "debug"):
        if not isinstance(given[name], bool):
            raise TypeError(f"{name} must be True or False; got {given[name]!r}.")
    if given["compile"]:
        _compilable(given["curvature"])


def solve_interval(steps: int, direction: str) -> None:
    """Raise ValueError for steps between solves that would need what only a solve measures."""
    if steps > 1 and direction == "residual":
        raise ValueError(
            f'solve_interval={steps} needs direction="gradient": the residual takes the curvature along z into the '
            "direction, which each step would have to measure anyway."
        )


def unchanged_metric(states: Sequence[dict[str, Any]], given: str | None) -> None:
    """Raise RuntimeError for a preconditioner that is not the one by which the state came about."""
    if any("z" in own and (SQUARE_AVERAGE in own) != (given is not None) for own in states):
        raise RuntimeError(
            f"preconditioner={given!r} is not what the steps so far were taken with, and β and ρ belong to the metric: "
            "to change it in training construct a new CurveBall over the parameters."
        )


def preconditioner(given: Any) -> None:
    """Raise ValueError for something else than the name of a preconditioner."""
    if given is not None and given not in PRECONDITIONERS:
        raise ValueError(f"preconditioner must be {' or '.join(map(repr, PRECONDITIONERS))}; got {given!r}.")


def _compilable(curvature: str) -> None:
    if curvature not in ("auto", "linearize"):
        raise ValueError(
            f'compile=True linearizes the model by a method of its own: leave out curvature="{curvature}".'
        )
    try:
        from .curvature import compiled  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"compile=True needs torch's compiler, which this torch ({torch.__version__}) lacks or keeps elsewhere: "
            f"{error}. Leave compile=True off."
        ) from error


def group_settings(group: Any, defaults: dict[str, Any]) -> None:
    """Raise for a group that sets what is not its own: one solve serves all groups, so the rest is the optimizer's."""
    if not isinstance(group, dict):
        raise TypeError(f"a parameter group must be a dict; got {type(group).__name__}.")
    group_values({name: group.get(name, defaults[name]) for name in PER_GROUP})
    for name, value in defaults.items():
        if name not in PER_GROUP and name in group and group[name] != value:
            raise ValueError(
                f"{name} belongs to the whole optimizer, as one joint solve serves all groups: give it to the "
                f"constructor. A group may have its own {' and '.join(PER_GROUP)}."
            )


def group_values(values: dict[str, Any]) -> None:
    """Raise for an `lr` or `weight_decay` that cannot be used."""
    lr = values["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(f"a tensor lr must be floating-point, with one element; got {lr.dtype}{list(lr.shape)}.")
        lr = lr.item()
    _number("lr", lr, 0.0, math.inf)
    _number("weight_decay", values["weight_decay"], 0.0, math.inf)


def curvature_batch(given: Any, params: Sequence[Tensor]) -> None:
    """Raise for a `curvature_batch` that is not two functions, or whose gradient would not add up."""
    if not isinstance(given, tuple) or len(given) != 2 or not all(callable(f) for f in given):
        raise TypeError("curvature_batch must be two functions, (model_fn, loss_fn), of a part of the batch.")
    if any(has_gradient_hooks(p) for p in params):
        raise RuntimeError("curvature_batch cannot be used with hooks that alter gradients: remove one of the two.")


def scaler(optimizer: Any, given: Any) -> None:
    """Raise for something else than a scaler, and for a step that a scaler calls."""
    if "grad_scale" in vars(optimizer):
        del optimizer.grad_scale, optimizer.found_inf
        raise RuntimeError(
            "GradScaler.step cannot unscale what CurveBall differentiates itself: instead of scaler.step(optimizer, "
            "...) write optimizer.step(model_fn, loss_fn, scaler=scaler), and scaler.update() as before."
        )
    if given is not None and not isinstance(given, torch.amp.GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler; got {type(given).__name__}.")
    if given is not None and awaits_update(given, optimizer):
        raise RuntimeError("the scaler has not been updated since this optimizer's last step: call scaler.update().")


def threads_there() -> None:
    """Raise RuntimeError in a process that lacks the threads on which the one that it was forked from has stepped."""
    global _threaded_process
    if torch.get_num_threads() == 1:
        return
    if _threaded_process is None:
        _threaded_process = os.getpid()
    elif _threaded_process != os.getpid():
        raise RuntimeError(
            "this process was forked from one that had taken steps on several threads, of which a fork has none: "
            'OpenMP would wait for them forever. Start it by the method "spawn" of torch.multiprocessing, or call '
            "torch.set_num_threads(1) in it first."
        )


def history_length(n: Any) -> None:
    """Raise for a number of steps that the history cannot hold."""
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= HISTORY:
        raise ValueError(f"n must be a whole number of steps, from 1 to {HISTORY}; got {n!r}.")


def parameters(params: Sequence[Any]) -> None:
    """Raise for parameters that the kernels cannot serve."""
    for i, p in enumerate(params):
        if is_sharded(p):
            raise TypeError(
                f"parameter {i} is sharded, by fully_shard, FullyShardedDataParallel or tensor parallelism: the model "
                "computes with other tensors than this one, with respect to which no Jacobian product can be taken. "
                "Keep the weights whole in each process, in DistributedDataParallel: CurveBall does not shard yet."
            )
        if p.layout != torch.strided:
            raise ValueError(f"parameter {i} is sparse ({p.layout}): CurveBall needs dense parameters.")
        if p.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            hint = "use torch.view_as_real" if p.is_complex() else "convert it to a floating-point dtype"
            raise TypeError(
                f"parameter {i} has dtype {p.dtype}: CurveBall needs float16, bfloat16, float32 or float64; {hint}."
            )
    devices = sorted({str(p.device) for p in params})
    if len(devices) > 1:
        raise ValueError(f"the parameters lie on several devices ({', '.join(devices)}): move the model to one.")


def separate_memory(params: Sequence[Tensor]) -> None:
    """Raise ValueError for parameters that share memory, or are one and the same, or whose own elements share it."""
    known: list[tuple[int, int, int]] = []  # first and last address, and which parameter
    for i, p in enumerate(params):
        if _has_memory(p):
            if any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride(), strict=True)):
                raise ValueError(
                    f"elements of parameter {i} share memory, as those of an expanded tensor do: clone it, "
                    "nn.Parameter(tensor.clone())."
                )
            known.append((p.data_ptr(), p.data_ptr() + span(p), i))
    known.sort()
    reaching: list[tuple[int, int, int]] = []  # beyond the next one's first address
    for first, last, i in known:
        reaching = [other for other in reaching if other[1] > first]
        for _, _, j in reaching:
            if params[i] is params[j]:
                raise ValueError(f"parameters {j} and {i} are the same one, which would be moved twice: give it once.")
            if _overlap(params[j], params[i]):
                raise ValueError(
                    f"parameters {min(i, j)} and {max(i, j)} are two tensors over one memory, which would be moved "
                    "twice: to tie weights use one nn.Parameter in both places, as in "
                    "`decoder.weight = encoder.weight`, and not their `.data`."
                )
        reaching.append((first, last, i))


def _has_memory(p: Tensor) -> bool:
    """Return whether `p` has elements at an address; fake tensors, tensors on "meta" and wrappers have none."""
    if is_lazy(p) or type(p).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False
    return p.numel() > 0 and p.data_ptr() != 0


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether an element of `b` lies where one of `a` does; `b` begins within `a`'s span."""
    if span(a) == a.numel() * a.element_size():
        return True  # there are no gaps that `b` could lie in
    start = a.data_ptr()
    taken = torch.zeros(max(span(a), b.data_ptr() - start + span(b)), dtype=torch.bool, device="cpu")
    places = [
        taken.as_strided(
            (*p.shape, p.element_size()), (*(s * p.element_size() for s in p.stride()), 1), p.data_ptr() - start
        )
        for p in (a, b)
    ]
    places[0].fill_(True)
    return bool(places[1].any())


def float64_on(device: torch.device) -> None:
    """Raise RuntimeError for a device that lacks float64, as Apple's does."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except Exception as error:
        raise RuntimeError(
            f"CurveBall needs float64 on the parameters' device, for the few numbers by which steps are decided, and "
            f"{device} has none: move the model to the CPU or to another device. ({error})"
        ) from error


def process_group(given: Any) -> None:
    """Raise TypeError for something else than a process group."""
    if given is not None and not (
        torch.distributed.is_available() and isinstance(given, torch.distributed.ProcessGroup)
    ):
        raise TypeError(
            "process_group must be one of torch.distributed, such as torch.distributed.group.WORLD after "
            f"init_process_group(); got {type(given).__name__}."
        )


def unread_gradients(params: Sequence[Tensor]) -> None:
    """Warn once where gradients lie in `.grad`: whoever has put them there may expect that a step reads them."""
    if any(p.requires_grad and p.grad is not None for p in params):
        announce(
            "unread gradients",
            "curveball_fused: parameters have a gradient in .grad, which CurveBall neither reads nor clears: "
            "backward(), clip_grad_norm_ and gradients summed up in .grad change nothing in its steps. Leave them out: "
            "step() differentiates the model itself. If they are for another optimizer, ignore this; "
            "backward(inputs=[...]), given that one's parameters, puts none here.",
        )


def is_state_dict(state_dict: Any) -> None:
    """Raise ValueError for something else than an optimizer's state_dict."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("not an optimizer's state_dict: it lacks 'state' and 'param_groups'.")


def checkpoint(state_dict: Any, param_groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for a state dictionary that does not fit the parameters."""
    is_state_dict(state_dict)
    saved, entries = state_dict["param_groups"], state_dict["state"]
    sizes, own = [len(g["params"]) for g in saved], [len(g["params"]) for g in param_groups]
    if sizes != own:
        raise ValueError(f"the checkpoint has groups of {sizes} parameters, this optimizer of {own}.")
    names = [name for group in saved for name in group["params"]]
    params = [p for group in param_groups for p in group["params"]]
    for position, (name, p) in enumerate(zip(names, params, strict=True)):
        entry = entries.get(name, {})
        z = entry.get("z")
        is_frozen = z is None and (not entry or not entry.keys().isdisjoint(SHAPES))
        if not is_frozen and not isinstance(z, Tensor):
            raise ValueError(f"the checkpoint has no CurveBall state for parameter {position}: another optimizer's?")
        if z is not None and z.shape != p.shape:
            raise ValueError(
                f"the checkpoint's state for parameter {position} has shape {tuple(z.shape)}, the parameter "
                f"{tuple(p.shape)}: it belongs to another model."
            )
    _metric_of(saved, [entries.get(name, {}) for name in names])
    if entries and sum(_has_numbers_of_all(entries.get(name, {})) for name in names) != 1:
        raise ValueError(
            "the checkpoint's CurveBall scalars are missing or of another version of this package. (They are with the "
            "state of the first parameter that is trained, and torch.distributed.checkpoint leaves out that of frozen "
            "ones: freeze the same parameters as when it was saved, before the optimizer is made.)"
        )
    if any("lambd" not in group for group in saved):  # that of an optimizer which has taken no step has no state
        raise ValueError("the checkpoint's groups lack the options of a CurveBall: another optimizer's?")


def _metric_of(groups: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for a checkpoint of a training in a metric that has lost it."""
    metric = groups[0].get("preconditioner") if groups else None
    learned = any(float(entry["scalars"][GATHERED]) > 0 for entry in entries if _has_numbers_of_all(entry))
    if metric is not None and learned and any("z" in entry and SQUARE_AVERAGE not in entry for entry in entries):
        raise ValueError(
            f"the checkpoint's options have preconditioner={metric!r}, and its state has lost the metric. (As "
            "torch.distributed.checkpoint does with a flattened state where the optimizer was made without it: give "
            f"preconditioner={metric!r} to the constructor.)"
        )


def _has_numbers_of_all(entry: dict[str, Any]) -> bool:
    shapes: dict[str, tuple[int, ...]] = {**SHAPES, **dict.fromkeys(ON_HOST, ())}
    return all(getattr(entry.get(name), "shape", None) == shape for name, shape in shapes.items())


def _number(name: str, value: Any, low: float, high: float, hint: str = "", low_open: bool = False) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number{hint}; got {value!r}.")
    value = float(value)
    if math.isnan(value) or math.isinf(value) or not low <= value <= high or (low_open and value == low):
        bounds = f"{'above' if low_open else 'at least'} {low}" if high == math.inf else f"between {low} and {high}"
        raise ValueError(f"{name} must be finite and {bounds}{hint}; got {value!r}.")
