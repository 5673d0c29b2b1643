"""All of torch's private interface that this package uses: the one place to look at when torch has a new version.

What the compiler is made of is in `compiler`, as it takes seconds to import. `tests/test_torch_private.py` fails where
another module reaches into torch by itself, and tries each name here.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import attrgetter
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch._C import DisableTorchFunction
from torch._compile import _disable_dynamo as disable_dynamo  # unlike torch.compiler.disable, does not import Dynamo
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.utils import parametrize
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from typing_extensions import override

__all__ = [
    "DisableTorchFunction",
    "OpOverload",
    "OpOverloadPacket",
    "OperatorMode",
    "TorchDispatchMode",
    "base_of",
    "buffers_of",
    "checks_errors",
    "copies_to",
    "disable_dynamo",
    "dual_level",
    "flash_attention_for_cpu",
    "flash_attention_for_cpu_backward",
    "foreach_add_",
    "foreach_copy_",
    "foreach_mul",
    "foreach_mul_",
    "foreach_norm",
    "forget_cached_parametrizations",
    "forward_grad_enabled",
    "gradient_hooks_set_aside",
    "has_gradient_hooks",
    "has_saved_tensor_hooks",
    "in_dual_level",
    "in_functorch_transform",
    "is_functorch_wrapped",
    "is_in_join",
    "is_sharded",
    "mark_as_stepped",
    "parameters_of",
    "recomputations_wrapped",
    "run_backward",
    "safe_softmax",
    "scaled_optimizers",
    "schema_of",
    "set_forward_grad_enabled",
    "softmax_backward",
    "storage_identity",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "version_of",
    "versions_kept",
    "weight_norm",
]

# Functions and operators.
foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm
safe_softmax = torch._safe_softmax
softmax_backward = torch._softmax_backward_data
weight_norm = torch._weight_norm
checks_errors = torch.ops.aten._linalg_check_errors
copies_to = torch.ops.aten._to_copy
flash_attention_for_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_attention_for_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

run_backward = torch.autograd.graph._engine_run_backward  # torch.autograd.grad, which modes cannot see

# What is switched on.
in_functorch_transform = torch._C._are_functorch_transforms_active
is_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
forward_grad_enabled = torch._C._is_fwd_grad_enabled
set_forward_grad_enabled = fwAD._set_fwd_grad_enabled

# Attributes.
base_of: Any = attrgetter("_base")  # of a view: the tensor whose memory it shows, or None
version_of: Any = attrgetter("_version")  # of a tensor: how often it has been written to
schema_of: Any = attrgetter("_schema")  # of an operator


class OperatorMode(TorchDispatchMode):
    """A mode of operators that may not meet the compiler, and so does not import it, which takes seconds."""

    @classmethod
    @override
    def _should_skip_dynamo(cls) -> bool:
        return False


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the module's own buffers by name; the dictionary itself, to be changed."""
    return module._buffers


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the module's own parameters by name."""
    return module._parameters


def storage_identity(tensor: Tensor) -> int:
    """Return what tensors over one memory have in common, whatever becomes of its place and size."""
    identity: int = tensor.untyped_storage()._cdata
    return identity


def forget_cached_parametrizations() -> None:
    """Empty what `torch.nn.utils.parametrize.cached` keeps, inside of its block."""
    parametrize._cache.clear()


_dual_level_lock = threading.RLock()  # torch has one level of dual numbers for all threads together


@contextmanager
def dual_level() -> Iterator[None]:
    """Open a level of dual numbers, as torch does, without the warnings that the first one comes with.

    Another thread that does so waits for its end.
    """
    with _dual_level_lock:
        _make_a_first_dual_number()
        with fwAD.dual_level():
            yield


@functools.cache
def _make_a_first_dual_number() -> None:
    """Let torch compile its decompositions by `torch.jit.script`, of which it warns 18 times that it is deprecated."""
    with warnings.catch_warnings(), fwAD.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        fwAD.make_dual(torch.zeros(()), torch.zeros(()))


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Return whether hooks may change the gradient of a leaf."""
    return bool(parameter._backward_hooks)


def is_sharded(parameter: Tensor) -> bool:
    """Return whether a parameter is a part of another: a DTensor, or what FullyShardedDataParallel makes."""
    return hasattr(parameter, "device_mesh") or hasattr(parameter, "_fsdp_flattened")


@contextmanager
def gradient_hooks_set_aside(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let the gradients of leaves be what the backward pass computes, within the block."""
    hooks = [p._backward_hooks for p in parameters]
    for p in parameters:
        p._backward_hooks = None
    try:
        yield
    finally:
        for p, own in zip(parameters, hooks, strict=True):
            p._backward_hooks = own


def in_dual_level() -> bool:
    """Return whether a level of dual numbers is open, unless by `dual_level` in another thread."""
    if not _dual_level_lock.acquire(blocking=False):
        return False
    try:
        return fwAD._current_level >= 0
    finally:
        _dual_level_lock.release()


def has_saved_tensor_hooks() -> bool:
    """Return whether autograd hands what it saves to hooks, as gradient checkpointing makes it."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


@contextmanager
def recomputations_wrapped(wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> Iterator[None]:
    """Wrap what the gradient checkpoints of this thread, begun within the block, will run again."""
    frame, thread = checkpoint._CheckpointFrame, threading.get_ident()

    def wrapped_frame(recompute: Callable[..., None], *args: Any) -> Any:
        return frame(wrap(recompute) if threading.get_ident() == thread else recompute, *args)

    vars(checkpoint)["_CheckpointFrame"] = wrapped_frame
    try:
        yield
    finally:
        vars(checkpoint)["_CheckpointFrame"] = frame


def versions_kept(tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Let autograd not know what is written to these tensors within the block, at whose end they are as before it."""
    return _unsafe_preserve_version_counter(tuple(tensors))


def is_in_join(wrapper: nn.parallel.DistributedDataParallel) -> bool:
    """Return whether a wrapper is within `with wrapper.join()`."""
    return bool(wrapper._join_config.enable)


def mark_as_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Let schedulers know that a step has come before them, where it was not taken by `optimizer.step`."""
    vars(optimizer)["_opt_called"] = True


def scaled_optimizers(scaler: torch.amp.GradScaler) -> Any:
    """Return the ids of the optimizers whose gradients a scaler has unscaled since its last `update`."""
    return vars(scaler).get("_per_optimizer_states", {})
