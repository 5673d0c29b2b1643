"""Watch a run of the model: which tensors its torch functions write to, and which generators they draw from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curveball_fused._torch_private import DisableTorchFunction, OpOverload, OpOverloadPacket, schema_of

from .control_flow import AS_WRITTEN
from .memory import Memory

# These write to their running statistics, although neither their names nor, for some, their schemas say so.
_NORMALIZATIONS = frozenset(
    ("batch_norm", "instance_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
)
_AUGMENTED = frozenset(f"__i{op}__" for op in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split())
# Whoever has the memory itself may write to it, or change its size, and no torch function is called for that.
_HAND_OUT_MEMORY = frozenset(("numpy", "__array__", "untyped_storage"))
# These change what autograd knows of a tensor, not its values.
_LEAVE_VALUES = frozenset(("requires_grad_", "share_memory_", "rename_"))
_ATTRIBUTES_WITHOUT_VALUES = frozenset(("requires_grad", "grad", "names"))


class Recorder(TorchFunctionMode):
    """Let `memory` keep every tensor that a torch function is about to write to, unless the run itself created it.

    Args:
        memory: told of what is written to, and of what the run creates.
        save_generator: called with each generator that the model passes to a torch function.
        dtypes: to which those of the results are added.
    """

    def __init__(
        self, memory: Memory, save_generator: Callable[[torch.Generator], None], dtypes: set[torch.dtype]
    ) -> None:
        super().__init__()
        self._memory = memory
        self._save_generator = save_generator
        self._dtypes = dtypes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in AS_WRITTEN:
            with self:
                return AS_WRITTEN[func](*args, **kwargs)
        if "generator" in kwargs and isinstance(kwargs["generator"], torch.Generator):
            self._save_generator(kwargs["generator"])
        written = _written(func, args, kwargs)
        if written:
            with DisableTorchFunction():  # reading a tensor's attributes is a torch function too
                self._memory.before_write(written)
        result = func(*args, **kwargs)
        with DisableTorchFunction():
            if written and getattr(func, "__name__", "") not in _HAND_OUT_MEMORY:
                self._memory.after_write(written)
            whole = isinstance(result, Tensor)
            if whole:
                self._dtypes.add(result.dtype)
            if not (whole and result.grad_fn is not None):  # that of most calls has a graph
                self._add_created(func, result, args, kwargs)
        return result

    def _add_created(self, func: Any, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(func, "__name__", "") != "__get__":  # `tensor.grad` was there before
            self._memory.add_created((result,), (*args, *kwargs.values()))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that `func` writes to."""
    if isinstance(func, OpOverloadPacket):
        func = getattr(func, func.overloads()[0])
    if isinstance(func, OpOverload):
        return _written_by_schema(func, args, kwargs)
    written = [kwargs["out"]] if "out" in kwargs else []
    name = getattr(func, "__name__", "")
    if name in _NORMALIZATIONS:
        # After the input come, but in torch.nn.functional, the affine parameters.
        first = 1 if func in (F.batch_norm, F.instance_norm) else 3
        written += [*args[first : first + 2], kwargs.get("running_mean"), kwargs.get("running_var")]
    elif name in ("embedding", "embedding_bag") and kwargs.get("max_norm") is not None:
        written.append(args[1])  # rows that are too long are rescaled in place
    elif name == "fused_moving_avg_obs_fake_quant":
        written += args
    elif name == "__set__":
        if func.__self__.__name__ not in _ATTRIBUTES_WITHOUT_VALUES:
            written.append(args[0])
    elif args and (kwargs.get("inplace") is True or _writes_to_first(name)):
        written.append(args[0])
    return written


@functools.cache
def _writes_to_first(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__") and name not in _LEAVE_VALUES
    return in_place or name in _AUGMENTED or name in _HAND_OUT_MEMORY or name == "__setitem__"


def _written_by_schema(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    written = []
    for i, argument in enumerate(schema_of(func).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return written
