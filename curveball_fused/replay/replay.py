"""Run a model several times in one step as the same function.

One step needs `model_fn` two to four times: for its Jacobian products, and for the loss at the new weights. Dropout
draws numbers and batch norm moves its statistics, so a plain second call would be another function, and would move
the statistics twice. `Replay` records what the first run changes, puts it back before every later run, and leaves
the world as the first run left it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from curveball_fused._torch_private import (
    DisableTorchFunction,
    OpOverload,
    OpOverloadPacket,
    buffers_of,
    is_functorch_wrapped,
    schema_of,
)

from .generators import generators

Result = TypeVar("Result")

# These write to their running statistics, although neither their names nor, for some, their schemas say so.
_NORMALIZATIONS = frozenset(
    ("batch_norm", "instance_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
)
_AUGMENTED = frozenset(f"__i{op}__" for op in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split())


class Unrepeatable(RuntimeError):
    """The model does what no other run, and so no method of differentiating it, can take part in."""


class Replay:
    """Make every later run of a callable the same function as the first run.

    Args:
        constant: tensors that are left alone whatever happens to them (the optimized parameters, which the optimizer
            itself moves between the runs).
        device: device whose generator is restored, beside the CPU's and Python's `random`.

    Attributes:
        dtypes: of the results of the first run.

    Use `first` for the first run and for what follows it in the same step (the loss), `again` for later runs, and
    `finish` or, after an error, `rewind` at the end.
    """

    def __init__(self, constant: Iterable[Tensor], device: torch.device) -> None:
        self._constant = {id(t) for t in constant}
        self._fresh: set[int] = set()
        self._external: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._after: dict[int, tuple[Tensor, Tensor]] = {}
        self._modules: dict[int, tuple[nn.Module, dict[str, Tensor | None]]] = {}
        self._modules_after: dict[int, tuple[nn.Module, dict[str, Tensor | None]]] = {}
        self._generators = generators(device)
        self.dtypes: set[torch.dtype] = set()

    def first(self, function: Callable[[], Result]) -> Result:
        """Run `function` and record what it changes."""
        thread = threading.get_ident()

        def on_call(module: nn.Module, _: Any) -> None:
            if threading.get_ident() == thread and id(module) not in self._modules:
                _refuse_wrapper(module)
                self._modules[id(module)] = (module, dict(buffers_of(module)))

        hook = register_module_forward_pre_hook(on_call)
        try:
            with _Recorder(self._save, self._generators.save_own, self._fresh, self._external, self.dtypes):
                result = function()
        finally:
            hook.remove()
        self._mark_buffers()
        return result

    def modules(self) -> list[nn.Module]:
        """Return the modules that the first run has called."""
        return [module for module, _ in self._modules.values()]

    def was_written(self, tensor: Tensor, before: Tensor) -> None:
        """Note that a run which could not be watched has written to `tensor`, whose value was `before`."""
        self._before[id(tensor)] = (tensor, before)
        self._after[id(tensor)] = (tensor, tensor.detach().clone())

    def again(self, function: Callable[[], Result]) -> Result:
        """Run `function` from the state in which the first run began."""
        self._generators.mark()
        self.rewind()
        return function()

    def rewind(self) -> None:
        """Put back what the runs changed: the state before the first run."""
        # The last saved first: of two views of one memory, the one that was saved first holds the older values.
        _put_back(reversed(self._before.values()), self._modules.values())
        self._generators.rewind()

    def finish(self) -> None:
        """Leave the state as the first run left it, however many runs followed."""
        _put_back(self._after.values(), self._modules_after.values())
        self._generators.finish()

    def _mark_buffers(self) -> None:
        """Note what a first run has left, at once: a backward pass that computes activations again may move it."""
        for key, (tensor, _) in self._before.items():
            if key not in self._after:
                self._after[key] = (tensor, tensor.detach().clone())
        for key, (module, buffers) in self._modules.items():
            if buffers and key not in self._modules_after:
                self._modules_after[key] = (module, dict(buffers_of(module)))

    def _save(self, tensor: Tensor) -> None:
        """Keep the value of `tensor`, which is about to be written."""
        if id(tensor) not in self._before and id(tensor) not in self._constant:
            self._before[id(tensor)] = (tensor, tensor.detach().clone())


def _put_back(
    tensors: Iterable[tuple[Tensor, Tensor]], modules: Iterable[tuple[nn.Module, dict[str, Tensor | None]]]
) -> None:
    for module, buffers in modules:  # a buffer may have been replaced by a new tensor rather than written to
        if buffers:
            buffers_of(module).update(buffers)
    with torch.no_grad():
        for tensor, value in tensors:
            tensor.copy_(value)


def _refuse_wrapper(module: nn.Module) -> None:
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise Unrepeatable(
            f"model_fn calls a {type(module).__name__}-wrapped module, but CurveBall differentiates the model itself "
            "and averages nothing: each process or device would take a step of its own from its own gradient, and the "
            "replicas would drift apart. Train the module without the wrapper, in one process and on one device; "
            "averaging across processes is not offered yet."
        )


class _Recorder(TorchFunctionMode):
    """Call `save` on every tensor that a torch function is about to write to, unless the run itself created it.

    The run created what autograd has a graph for, and a memory (`fresh`) that first showed up as the result of a call;
    but not, whatever its graph says by now, a memory that was once saved (`external`).
    """

    def __init__(
        self,
        save: Callable[[Tensor], None],
        save_generator: Callable[[torch.Generator], None],
        fresh: set[int],
        external: set[int],
        dtypes: set[torch.dtype],
    ) -> None:
        super().__init__()
        self._save = save
        self._save_generator = save_generator
        self._fresh = fresh
        self._external = external
        self._dtypes = dtypes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if "generator" in kwargs and isinstance(kwargs["generator"], torch.Generator):
            self._save_generator(kwargs["generator"])
        written = _written(func, args, kwargs)
        if written:
            with DisableTorchFunction():  # reading a tensor's attributes is a torch function too
                for tensor in _tensors(written):
                    self._save_external(tensor)
        result = func(*args, **kwargs)
        with DisableTorchFunction():
            whole = isinstance(result, Tensor)
            if whole:
                self._dtypes.add(result.dtype)
            if not (whole and result.grad_fn is not None):  # that of most calls has a graph
                self._add_fresh(result, args, kwargs)
        return result

    def _save_external(self, tensor: Tensor) -> None:
        memory = _memory(tensor)
        if memory in self._external or (tensor.grad_fn is None and memory not in self._fresh):
            self._external.add(memory)
            self._save(tensor)

    def _add_fresh(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the memory of a result; one in that of an argument is a view, fresh or not as that is."""
        memories = {_memory(t) for t in _tensors((result,))}
        if memories:
            self._fresh |= memories - {_memory(t) for t in _tensors((*args, *kwargs.values()))}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            # Inside torch.func transforms tensors are wrapped and have no memory of their own to write to.
            if value.layout == torch.strided and not is_functorch_wrapped(value):
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that `func` writes to."""
    if isinstance(func, OpOverloadPacket):
        func = getattr(func, func.overloads()[0])
    if isinstance(func, OpOverload):
        return _written_by_schema(func, args, kwargs)
    written = [kwargs["out"]] if "out" in kwargs else []
    name = getattr(func, "__name__", "")
    if name in _NORMALIZATIONS:
        # Statistics, and the affine parameters, which it does no harm to save, are vectors; the input is not.
        written += [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() == 1]
    elif name in ("embedding", "embedding_bag") and kwargs.get("max_norm") is not None:
        written.append(args[1])  # rows that are too long are rescaled in place
    elif name == "fused_moving_avg_obs_fake_quant":
        written += args
    elif args and (kwargs.get("inplace") is True or _writes_to_first(name)):
        written.append(args[0])
    return written


@functools.cache
def _writes_to_first(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _AUGMENTED or name in ("__setitem__", "__set__")


def _written_by_schema(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    written = []
    for i, argument in enumerate(schema_of(func).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return written
