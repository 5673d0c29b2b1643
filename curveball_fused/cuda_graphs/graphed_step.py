"""The whole step as CUDA graphs: one launch on the host instead of hundreds.

A graph repeats what the device did while it was captured, at the same addresses and with the host's numbers of then.
So what changes from step to step must have a fixed place on the device: the batch, the learning rates, the state, which
every captured step leaves where it found it, and the generators' positions. What the host decides by counting steps,
whether a step solves in full and whether it adapts λ, is one graph for each case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from curveball_fused import state
from curveball_fused._torch_private import (
    buffers_of,
    mark_as_stepped,
    parameters_of,
    tree_flatten,
    tree_leaves,
    tree_map,
)
from curveball_fused.curvature import METHODS
from curveball_fused.optimizer import CurveBall
from curveball_fused.preconditioners import EARLY_STEPS
from curveball_fused.replay import Replay
from curveball_fused.replay.generators import host_positions
from curveball_fused.settings import Settings
from curveball_fused.step import StepInputs, StepKind, finish, intervals, kind_of, prepared, run_step
from curveball_fused.step_arguments import GivenPart, arguments_of

from .capture import Capture, Pool
from .host_reads import refuse_host_reads

ModelOf = Callable[[Any], Any]
LossOf = Callable[[Any, Any], Tensor]
_WARM_UPS = 3  # libraries choose kernels and allocate workspaces in the first runs


def make_graphed_step(
    optimizer: CurveBall, model_fn: ModelOf, loss_fn: LossOf, sample_batch: tuple[Any, Any]
) -> GraphedStep:
    """Capture `optimizer.step` for batches of one shape as CUDA graphs.

    `TypeError` or `ValueError` is raised for an argument that cannot be used, with what to do; `RuntimeError` for a
    model that cannot be captured, with what it does on the host, and where.

    Args:
        optimizer: over CUDA parameters. Its learning rates may change from step to step; all other settings, the
            modes of modules (train, eval) and which parameters require gradients are those of now.
        model_fn: maps `inputs` to the predictions, as `CurveBall.step` knows them; a module, say. Its random numbers
            must come from the default generator of the device.
        loss_fn: maps the predictions and `targets` to the scalar loss; `F.cross_entropy`, say.
        sample_batch: `(inputs, targets)`: each a tensor, or nested lists, tuples or dictionaries of tensors, numbers
            and strings. Some steps are taken with it, of which nothing stays.

    Returns:
        A function `(inputs, targets) -> (loss, outputs)`, see `GraphedStep`.

    Example::

        optimizer = CurveBall(model.parameters())  # on a CUDA device
        step = make_graphed_step(optimizer, model, F.cross_entropy, next(iter(loader)))
        for inputs, targets in loader:  # with drop_last=True
            loss, outputs = step(inputs, targets)
    """
    return GraphedStep(optimizer, model_fn, loss_fn, sample_batch)


class _Graph(NamedTuple):
    """A captured step, and what it returns."""

    capture: Capture
    loss: Tensor
    outputs: Any


class GraphedStep:
    """A step that replays graphs; made by `make_graphed_step`.

    It is interchangeable with `optimizer.step`: both may be called in turn, checkpoints saved and loaded between them,
    and the resulting weights are the same, bit for bit.
    """

    def __init__(self, optimizer: CurveBall, model_fn: ModelOf, loss_fn: LossOf, sample_batch: tuple[Any, Any]) -> None:
        _check(optimizer, model_fn, loss_fn, sample_batch)
        self._optimizer = optimizer
        self._device = optimizer._device
        self._pool = Pool(self._device)
        self._batch = tree_map(self._copied_to_device, tuple(sample_batch))
        self._given = GivenPart((lambda: model_fn(self._batch[0]), lambda outputs: loss_fn(outputs, self._batch[1])))
        self._inputs = StepInputs([self._given.part()])
        self._rates = [torch.zeros((), dtype=torch.float64, device=self._device) for _ in optimizer.param_groups]
        self._rates_hold: list[float | None] = [None] * len(self._rates)
        self._failures_when_watched: dict[StepKind, str] = {}
        # A graph reads the rates on the device anew in every replay.
        settings = replace(Settings.of(optimizer), lr=tuple(self._rates))
        with torch.no_grad():
            shared = prepared(optimizer, settings)
            if optimizer._processes is not None:
                raise RuntimeError("a graphed step is of one process: in several call optimizer.step.")
            kinds = sorted({kind_of(settings, step) for step in _examples(settings)})
            self._modules = self._warm_up(kinds, shared, settings)
            self._shared = {name: shared[name] for name in state.REPLACED}
            self._followed = {name: shared[name] for name in ("method", "compute_dtype")}
            self._own = _own_state(optimizer)
            self._made_for = _unchanging(optimizer, self._modules)
            # What a model keeps beside its buffers, such as a table that a longer input has it replace: a graph reads
            # the old one.
            self._held = [t for module in self._modules for t in vars(module).values() if isinstance(t, Tensor)]
            self._graphs = {kind: self._captured(kind, shared, settings) for kind in kinds}

    def __call__(self, inputs: Any, targets: Any) -> tuple[Tensor, Any]:
        """Take one step, with the optimizer's hooks.

        `ValueError` is raised for a batch that differs from the sample, `RuntimeError` where the optimizer or its
        parameters are not what the graphs were made for. Nothing has been changed then.

        Args:
            inputs: of the shapes, dtypes and structure of the sample's, on the device or on the CPU.
            targets: the same.

        Returns:
            The loss, 0-dim, and the predictions at the weights before the step, in their structure, detached. The
            predictions are the graph's own memory, which the next call overwrites: clone them to keep them.

        Example::

            for inputs, targets in loader:
                loss, outputs = step(inputs, targets)
                correct += (outputs.argmax(1) == targets).sum()
        """
        return _step_with_hooks(self._optimizer, self, inputs, targets)

    @torch.no_grad()
    def _replay(self, inputs: Any, targets: Any) -> tuple[Tensor, Any]:
        if _unchanging(self._optimizer, self._modules) != self._made_for:
            raise RuntimeError(
                "the optimizer's settings, the places of parameters or buffers, or what requires a gradient have "
                "changed since the graphs were made: call make_graphed_step again. (Learning rates may change.)"
            )
        settings = Settings.of(self._optimizer)
        self._fill((inputs, targets))
        shared = self._state_in_place(settings)
        self._set_rates()
        graph = self._graphs[kind_of(settings, shared["step"])]
        graph.capture.replay()
        shared |= self._followed
        finish(self._optimizer, shared, settings)
        torch.autograd.graph.increment_version([*self._own, *(own["z"] for own in self._own.values())])
        return graph.loss.clone(), graph.outputs

    def _copied_to_device(self, leaf: Any) -> Any:
        return leaf.detach().to(self._device, copy=True) if isinstance(leaf, Tensor) else leaf

    def _fill(self, batch: tuple[Any, Any]) -> None:
        """Copy the batch to the places that the graphs read."""
        places, structure = tree_flatten(self._batch)
        given, given_structure = tree_flatten(batch)
        if structure != given_structure:
            raise ValueError(f"this batch has the structure {given_structure}, the sample had {structure}.")
        for place, source in zip(places, given, strict=True):
            if _described(place) != _described(source):
                raise ValueError(
                    f"a graph is for one shape: the sample had {_described(place)} where this batch has "
                    f"{_described(source)}. Leave out an incomplete last batch (drop_last=True), or call "
                    "optimizer.step for it."
                )
        for place, source in zip(places, given, strict=True):
            if isinstance(place, Tensor) and place is not source:
                place.copy_(source, non_blocking=True)

    def _state_in_place(self, settings: Settings) -> dict[str, Any]:
        """Put the optimizer's state where the graphs read it; ordinary steps and checkpoints bring new tensors."""
        shared = prepared(self._optimizer, settings)
        for name, place in self._shared.items():
            if shared[name] is not place:
                place.copy_(shared[name])
                shared[name] = place
        for p, places in self._own.items():
            own = self._optimizer.state[p]
            for name, place in places.items():
                if own[name] is not place:
                    own[name] = place.copy_(own[name])
        return shared

    def _set_rates(self) -> None:
        """Copy the groups' learning rates to where the graphs read them, if they have changed."""
        for i, group in enumerate(self._optimizer.param_groups):
            rate = group["lr"]
            if isinstance(rate, Tensor) and rate.device == self._device:
                self._rates[i].copy_(rate.reshape(()))
                self._rates_hold[i] = None
            elif self._rates_hold[i] != float(rate):
                self._rates_hold[i] = float(rate)
                self._rates[i].fill_(float(rate))

    def _warm_up(self, kinds: Sequence[StepKind], shared: dict[str, Any], settings: Settings) -> list[nn.Module]:
        """Take ordinary steps of each kind, of which nothing stays but the method, and what libraries have learned.

        Args:
            kinds: all that there are.
            shared: the state that belongs to all parameters.
            settings: the optimizer's, with the rates on the device.

        Returns:
            The modules that the model consists of.
        """
        replay, drawn = Replay([], self._device), host_positions(self._device)

        def run(kind: StepKind) -> None:
            shared["step"] = _a_step_of(kind, settings)
            try:
                replay.first(lambda: run_step(self._optimizer, self._inputs, shared, settings))
                if drawn != host_positions(self._device):
                    raise RuntimeError(
                        "model_fn draws random numbers on the host, with Python's random or torch's CPU generator, "
                        "which a graph would repeat in every step: draw them on the device."
                    )
            finally:
                replay.rewind()

        with self._pool.stream(), _put_back(self._optimizer, shared):
            self._set_rates()
            run(max(kinds))  # a full step: in the first one the guard reads what it has compared
            for kind in kinds:
                self._failures_when_watched[kind] = refuse_host_reads(partial(run, kind), self._device)
            for kind in list(kinds) * _WARM_UPS:
                run(kind)
        return replay.modules()

    def _captured(self, kind: StepKind, shared: dict[str, Any], settings: Settings) -> _Graph:
        """Make the graph of steps of one kind. While it is made nothing runs on the device."""
        before, buffers = dict(shared), [dict(buffers_of(module)) for module in self._modules]
        shared["step"] = _a_step_of(kind, settings)
        capture = Capture(self._pool, METHODS[shared["method"]].reruns)
        try:
            with capture.recording():
                loss, (outputs,) = run_step(self._optimizer, self._inputs, shared, settings)
                outputs = self._given.of(outputs)
                for name, place in self._shared.items():
                    if shared[name] is not place:
                        place.copy_(shared[name])
        except RuntimeError as error:
            failure = self._failures_when_watched[kind]
            watched = (
                f" Before, while it was watched for host reads, the step failed with {failure}." if failure else ""
            )
            raise RuntimeError(
                f"the step could not be captured as a CUDA graph: {error}. Something in model_fn or loss_fn waits for "
                'the device, or uses another stream; torch.cuda.set_sync_debug_mode("error") with optimizer.step may '
                f"name the line.{watched}"
            ) from error
        finally:
            shared.update(before)
            torch.clear_autocast_cache()  # in which there may be copies that only a replay fills
            moved = _unchanging(self._optimizer, self._modules) != self._made_for
            for module, own in zip(self._modules, buffers, strict=True):
                buffers_of(module).update(own)
        if moved:
            raise RuntimeError(
                "the model replaces a buffer by a new tensor, which a graph cannot repeat: write to it, as with "
                "self.mean.mul_(0.9).add_(0.1 * mean)."
            )
        return _Graph(capture, loss, outputs)


@Optimizer.profile_hook_step
def _step_with_hooks(optimizer: CurveBall, graphed: GraphedStep, inputs: Any, targets: Any) -> tuple[Tensor, Any]:
    """Replay as a step of the optimizer: with its hooks, and known to schedulers."""
    mark_as_stepped(optimizer)
    return graphed._replay(inputs, targets)


def _check(optimizer: Any, model_fn: Any, loss_fn: Any, sample_batch: Any) -> None:
    if not isinstance(optimizer, CurveBall):
        raise TypeError(f"optimizer must be a CurveBall; got {type(optimizer).__name__}.")
    if not callable(model_fn) or not callable(loss_fn):
        raise TypeError("model_fn and loss_fn must be functions, of the inputs and of (predictions, targets).")
    name, needed = arguments_of(model_fn)
    if needed > 1:
        raise TypeError(
            f"model_fn is called with the inputs alone, and {name} needs {needed} arguments: write "
            "make_graphed_step(optimizer, model, loss_fn, (inputs, targets)). The model comes first, the loss second."
        )
    for option in ("compile", "debug"):
        if optimizer.defaults[option]:
            raise ValueError(f"an optimizer with {option}=True cannot be captured: construct it without.")
    if not isinstance(sample_batch, (tuple, list)) or len(sample_batch) != 2:
        raise TypeError("sample_batch must be two things, (inputs, targets), as they will be given to the step.")
    for leaf in tree_leaves(tuple(sample_batch)):
        if not isinstance(leaf, (Tensor, int, float, str, NoneType)):
            raise TypeError(
                f"sample_batch holds a {type(leaf).__name__}: give tensors, numbers and strings, in lists, tuples or "
                "dictionaries."
            )


def _examples(settings: Settings) -> tuple[int, ...]:
    """Return numbers of steps among which there are all kinds."""
    later = (n * (-(-EARLY_STEPS // n) + i) for n in (1, *intervals(settings)) for i in range(4))
    return *range(EARLY_STEPS), *later


def _a_step_of(kind: StepKind, settings: Settings) -> int:
    return next(step for step in _examples(settings) if kind_of(settings, step) == kind)


def _unchanging(optimizer: CurveBall, modules: Sequence[nn.Module]) -> list[Any]:
    """Return what the graphs have in them: settings other than rates, and the places of parameters and buffers."""
    names = optimizer.defaults.keys() - {"lr"}
    settings = [{name: group[name] for name in names & group.keys()} for group in optimizer.param_groups]
    places = [(p.data_ptr(), p.requires_grad) for p in optimizer._parameters]
    in_modules = [
        t.data_ptr()
        for module in modules
        for tensors in (parameters_of(module), buffers_of(module))
        for t in tensors.values()
        if t is not None
    ]
    return [settings, places, in_modules]


def _own_state(optimizer: CurveBall) -> dict[Tensor, dict[str, Tensor]]:
    """Return what the state has of each parameter by itself, which steps write to: z, and its block of P."""
    shared = (*state.SHAPES, *state.ON_HOST)
    return {
        p: {name: t for name, t in optimizer.state[p].items() if isinstance(t, Tensor) and name not in shared}
        for p in optimizer._parameters
        if p.requires_grad
    }


def _described(leaf: Any) -> str:
    return f"a {leaf.dtype} tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


@contextmanager
def _put_back(optimizer: CurveBall, shared: dict[str, Any]) -> Iterator[None]:
    """Restore weights and state at the end of the block, except for the method by which the model was linearized."""
    live = [p for p in optimizer._parameters if p.requires_grad]
    live += [t for own in _own_state(optimizer).values() for t in own.values()]
    values, before = [t.detach().clone() for t in live], dict(shared)
    try:
        yield
    finally:
        for t, value in zip(live, values, strict=True):
            t.copy_(value)
        shared.update({name: before[name] for name in (*state.REPLACED, "step")})
