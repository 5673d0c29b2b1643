"""What a function costs: multiply-adds, seconds, bytes."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import (
    addmm_flop,
    baddbmm_flop,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

from curveball_fused import backends
from curveball_fused._torch_private import (
    TorchDispatchMode,
    flash_attention_for_cpu,
    flash_attention_for_cpu_backward,
    tree_leaves,
)

_aten = torch.ops.aten
# torch's formulas, and some that it lacks. A multiply-add is two floating-point operations.
FORMULAS: dict[Any, Callable[..., int]] = flop_registry | {
    _aten.addmm_: addmm_flop,
    _aten.baddbmm_: baddbmm_flop,
    _aten.mv: shape_wrapper(lambda a, x, **_: 2 * a[0] * a[1]),
    _aten.addmv: shape_wrapper(lambda b, a, x, **_: 2 * a[0] * a[1]),
    flash_attention_for_cpu: shape_wrapper(lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)),
    flash_attention_for_cpu_backward: shape_wrapper(lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)),
}
if backends.has_operators():
    # Five products, of scores with tangents and of them with values, where attention itself has two.
    FORMULAS[torch.ops.curveball_fused.attention_tangent] = shape_wrapper(
        lambda dq, dk, dv, q, k, v, *_, **__: 5 * sdpa_flop_count(q, k, v) // 2
    )


@dataclass(frozen=True)
class Cost:
    """What one run costs.

    Attributes:
        multiply_adds: in matrix products, convolutions and attention, as torch.utils.flop_counter counts them.
        seconds: the median of several runs.
        peak_bytes: the most that the tensors that the run allocated took at a time. On CUDA as torch's allocator
            counts; on the CPU by following the memory of every tensor that an operator returned, without what an
            operator allocates inside itself.
    """

    multiply_adds: int
    seconds: float
    peak_bytes: int


class Meter(TorchDispatchMode):
    """Count multiply-adds, and the bytes of the tensors that were made inside it and are alive.

    It counts as torch's FlopCounterMode, which cannot be used here: that follows modules by hooks on their inputs, and
    sets these with torch calls that a tape sees as the model's own.

    Attributes:
        multiply_adds: so far.
        peak_bytes: most that were alive at a time, so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.multiply_adds = 0
        self.peak_bytes = 0
        self._alive_bytes = 0
        # By their identities: torch keeps the Python object of a memory as long as the memory itself.
        self._made: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._given: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for memory in _memories((args, kwargs)):
            if id(memory) not in self._made:
                self._given.add(memory)
        result = func(*args, **kwargs)
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.multiply_adds += formula(*args, **kwargs, out_val=result) // 2
        for memory in _memories(result):
            if id(memory) not in self._made and memory not in self._given:
                self._follow(memory)
        return result

    def _follow(self, memory: torch.UntypedStorage) -> None:
        key, size = id(memory), memory.nbytes()

        def freed(_: Any) -> None:
            self._alive_bytes -= self._made.pop(key)[1]

        self._made[key] = (weakref.ref(memory, freed), size)
        self._alive_bytes += size
        self.peak_bytes = max(self.peak_bytes, self._alive_bytes)


def counted(function: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """Return multiply-adds and peak bytes of one run on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with Meter() as meter:
        function()
    if device.type != "cuda":
        return meter.multiply_adds, meter.peak_bytes
    return meter.multiply_adds, torch.cuda.max_memory_allocated(device) - before


def median_seconds(
    functions: Sequence[Callable[[], Any]], prepare: Callable[[], None], device: torch.device
) -> list[float]:
    """Time functions in turn, 3 times at least, at most 50 times or some 3 seconds.

    Args:
        functions: called without arguments.
        prepare: called before each, outside of the time.
        device: synchronized before and after each.

    Returns:
        The median of each.
    """
    times: list[list[float]] = [[] for _ in functions]
    start = time.perf_counter()
    while len(times[0]) < 3 or (len(times[0]) < 50 and time.perf_counter() - start < 3.0):
        for function, own in zip(functions, times, strict=True):
            prepare()
            _wait(device)
            began = time.perf_counter()
            function()
            _wait(device)
            own.append(time.perf_counter() - began)
    return [statistics.median(own) for own in times]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memories(values: Any) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, Tensor) and t.layout == torch.strided]
