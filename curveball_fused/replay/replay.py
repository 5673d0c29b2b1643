"""Run a model several times in one step as the same function.

One step needs `model_fn` two to four times: for its Jacobian products, and for the loss at the new weights. Dropout
draws numbers and batch norm moves its statistics, so a plain second call would be another function, and would move
the statistics twice. `Replay` records what the first run changes, puts it back before every later run, and leaves
the world as the first run left it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from curveball_fused._torch_private import (
    DisableTorchFunction,
    forget_cached_parametrizations,
    recomputations_wrapped,
    versions_kept,
)

from .generators import generators
from .memory import Memory, Snapshot, Unrepeatable
from .modules import Modules
from .recorder import Recorder

Result = TypeVar("Result")


class Replay:
    """Make every later run of a callable the same function as the first run.

    A model may write to its parameters, by `weight.data.mul_(mask)` for instance, before it uses them. That is a part
    of each run, and what is put back between the runs includes it; only `again_at_new_weights` takes the parameters as
    they are.

    Args:
        params: the optimized parameters.
        device: device whose generator is restored, beside the CPU's, Python's `random` and NumPy's.

    Attributes:
        dtypes: of the results of the first run.

    Use `first` for the first run and for what follows it in the same step (the loss), `again` for later runs. At the
    end, before the parameters are updated, use `finish` or, after an error, `rewind`; after the update
    `again_at_new_weights`.
    """

    def __init__(self, params: Iterable[Tensor], device: torch.device) -> None:
        self._memory = Memory(params)
        self._modules = Modules()
        self._generators = generators(device)
        self.dtypes: set[torch.dtype] = set()

    def first(self, function: Callable[[], Result]) -> Result:
        """Run `function` and record what it changes."""
        forget_cached_parametrizations()
        with DisableTorchFunction():  # a method's modes may be active
            self._memory.begin()
        with self._watching_modules(), self._recorder(), self._watching_checkpoints():
            result = function()
        # At once: a backward pass that computes activations again may move it.
        with DisableTorchFunction():
            self._memory.mark()
        self._modules.mark()
        return result

    def close(self) -> None:
        """Leave the generators as the first run left them, and note where that is, before something else runs."""
        self._generators.finish()
        self._generators.mark()

    def again(self, function: Callable[[], Result]) -> Result:
        """Run `function` from the state in which the first run began."""
        self._generators.mark()
        self.rewind()
        return self.run_again(function)

    def again_at_new_weights(self, function: Callable[[], Result]) -> Result:
        """Run `function` from that state, but for the parameters, which have moved; then leave all as it is now."""
        moved = self.written_parameters()
        self._generators.mark()
        try:
            self.rewind()
            moved.put_back()
            return self.run_again(function)
        finally:
            self.finish()
            moved.put_back()

    def rewind(self) -> None:
        """Put back what the runs changed: the state before the first run."""
        forget_cached_parametrizations()
        self._modules.rewind()
        with DisableTorchFunction(), torch.no_grad():  # a method's modes may be active
            self._memory.rewind()
        self._generators.rewind()

    def finish(self) -> None:
        """Leave the state as the first run left it, however many runs followed."""
        forget_cached_parametrizations()
        self._modules.finish()
        with DisableTorchFunction(), torch.no_grad():
            self._memory.finish()
        self._generators.finish()

    @property
    def wrote_parameters(self) -> bool:
        """Whether the first run has written to parameters."""
        return self._memory.wrote_parameters

    def modules(self) -> list[nn.Module]:
        """Return the modules that the first run has called."""
        return self._modules.called()

    def was_written(self, tensor: Tensor, before: Tensor) -> None:
        """Note that a run which could not be watched has written to `tensor`, whose value was `before`."""
        self._memory.was_written(tensor, before)

    def written_parameters(self) -> Snapshot:
        """Return the parameters that a run has written to, as they are now."""
        return self._memory.written_parameters()

    def run_again(self, function: Callable[[], Result]) -> Result:
        """Run `function` from the state as it is."""
        with self._watching_checkpoints():
            if not self.wrote_parameters:
                return function()
            with self._recorder():  # so that autograd learns of a write to a parameter that it has saved
                return function()

    def _recorder(self) -> Recorder:
        return Recorder(self._memory, self._generators.save_own, self.dtypes)

    def _watching_checkpoints(self) -> AbstractContextManager[None]:
        """Return a context in which a gradient checkpoint runs again, in a backward pass, with its first buffers.

        Spectral norm, for one, moves the vectors by which it divides: on its own, torch would divide by others then.
        """
        return recomputations_wrapped(self._as_at_first)

    def _as_at_first(self, recompute: Callable[..., None]) -> Callable[..., None]:
        with DisableTorchFunction(), torch.no_grad():
            begun = self._memory.of_now()  # what is first written to later on is, here, as it was before the run

        def recompute_as_at_first(*args: Any) -> None:
            with DisableTorchFunction(), torch.no_grad():
                now = self._memory.of_now()
            with versions_kept(now.tensors):
                try:
                    with DisableTorchFunction(), torch.no_grad():
                        self._memory.rewind()
                        begun.put_back()
                    with self._watching_checkpoints():  # those inside this one
                        recompute(*args)
                finally:
                    with DisableTorchFunction(), torch.no_grad():
                        now.put_back()

        return recompute_as_at_first

    @contextmanager
    def _watching_modules(self) -> Iterator[None]:
        thread = threading.get_ident()

        def on_call(module: nn.Module, _: Any) -> None:
            if threading.get_ident() == thread:
                _refuse_wrapper(module)
                buffers = self._modules.on_call(module)
                if buffers:
                    with DisableTorchFunction():
                        self._memory.watch_buffers(buffers)
                if isinstance(module, torch.jit.ScriptModule):  # inside, nobody sees what is written to
                    with DisableTorchFunction():
                        self._memory.before_write(list(module.buffers()))

        hook = register_module_forward_pre_hook(on_call)
        try:
            yield
        finally:
            hook.remove()


def _refuse_wrapper(module: nn.Module) -> None:
    if isinstance(module, nn.DataParallel):
        raise Unrepeatable(
            "model_fn calls a DataParallel-wrapped module, which copies the model to other devices, where no method "
            "follows it: use DistributedDataParallel, with a process for each device."
        )
    # That of the optimizer's own parameters has a `forward` of its own during a step, which calls the model itself.
    if isinstance(module, nn.parallel.DistributedDataParallel) and "forward" not in vars(module):
        raise Unrepeatable(
            "model_fn calls a DistributedDataParallel-wrapped module without a parameter of this optimizer, or in a "
            "place that is of one process, such as explain: call the module inside it, wrapper.module. (One that was "
            "made after the optimizer's first step needs a new optimizer, which takes over the state_dict() of the "
            "former; gc.freeze(), where it is used, must come after the first step.)"
        )
    is_sync = isinstance(module, nn.SyncBatchNorm) and module.training
    if is_sync and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise Unrepeatable(
            "model_fn calls SyncBatchNorm, whose outputs depend on other processes' batches, which Jacobian products "
            "do not follow: use nn.BatchNorm, or a norm without statistics of the batch, such as nn.GroupNorm."
        )
