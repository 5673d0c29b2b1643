"""The compiled step: torch.compile runs the model, and its backward graph, transposed, is the map v ↦ Jv.

torch.compile follows `model_fn` (and follows it anew when shapes, modes or modules change), and AOTAutograd makes of it
a forward graph, which returns residuals, and a backward graph u ↦ Jᵀu, which reads them. That second graph is linear
in u, so its own derivative with respect to u, pulled back, is v ↦ Jv: a third graph, of the same residuals. The primal
runs once in a step, and the three graphs, compiled by Inductor, cost 7 forward-equivalents of multiply-adds together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from curveball_fused._torch_private import version_of
from curveball_fused._torch_private.compiler import (
    FailOnRecompileLimitHit,
    TorchDynamoException,
    aot_autograd,
    boxed,
    compile_fx_inner,
    detect_fake_mode,
    inductor_config,
    min_cut_rematerialization_partition,
    recompile_limit,
    select_decomp_table,
)
from curveball_fused.replay import Replay
from curveball_fused.user_warnings import announce

from .linear_map import LinearMap, ModelFn, NotTrainable, checked_outputs, dense_gradients, independent_outputs
from .transpose import SEVERAL, CompileUnsupported, transpose

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[[list[Any]], Sequence[Any]]]


class Compiled(LinearMap):
    """Jacobian products from one compiled run of the model, for `compile=True`.

    Raises:
        RuntimeError: the model cannot be compiled as one graph; the message says why.
    """

    def __init__(self, model_fn: ModelFn, params: Sequence[Tensor], replay: Replay) -> None:
        self._params = params
        self._run = _Run(replay)
        self._outputs = _run(model_fn, self._run)
        if not self._outputs.requires_grad:
            raise independent_outputs()
        replay.dtypes.update(v.dtype for v in self._run.values.values() if isinstance(v, Tensor))

    @override
    def jvp(self, tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        by_id = {id(p): _like(t, p) for p, t in zip(self._params, tangents, strict=True)}
        graph, inputs = self._run.graph, self._run.inputs
        assert graph is not None
        # What the graph differentiates but this optimizer does not hold stands still.
        active = [inputs[i] for i in graph.active]
        directions = [by_id[id(x)] if id(x) in by_id else torch.zeros_like(x) for x in active]
        return self._outputs.detach(), graph.jvp(self._run.values, directions)

    @property
    @override
    def operators(self) -> frozenset[str]:
        assert self._run.graph is not None
        return frozenset((f"graph {self._run.graph.number}",))

    @override
    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        return dense_gradients(
            self._params, torch.autograd.grad(self._outputs, self._params, cotangent, allow_unused=True)
        )


def evaluate_compiled(model_fn: ModelFn) -> Tensor:
    """Return the outputs alone, by the same compiled code, for the loss at the new weights."""
    return _run(model_fn, _Run(replay=None)).detach()


@dataclass
class _Run:
    """One run of a compiled model.

    Attributes:
        replay: told what the run has written to; None where the caller is `Replay.again`.
        graph: the code that ran.
        inputs: what it read, the parameters among them.
        values: what its forward graph returned, residuals included, by name.
        outputs: what it returned to the caller.
    """

    replay: Replay | None
    graph: _Graph | None = None
    inputs: Sequence[Any] = ()
    values: dict[str, Any] = field(default_factory=dict)
    outputs: Tensor | None = None


_numbers = itertools.count()  # of graphs, by which they are told apart
_current: ContextVar[_Run | None] = ContextVar("run", default=None)


def _run(model_fn: ModelFn, run: _Run) -> Tensor:
    # torch.compile keeps what it compiled by code object: the user's own, unless there is none.
    function = model_fn if isinstance(model_fn, FunctionType) else lambda: model_fn()
    token = _current.set(run)
    try:
        with torch.enable_grad(), torch.compiler.set_stance("default"):
            outputs = checked_outputs(torch.compile(function, backend=backend, fullgraph=True, dynamic=False)())
    except FailOnRecompileLimitHit as error:
        raise _refusal(
            f"it has been compiled for {recompile_limit()} combinations of shapes, modes and "
            "modules (pad batches to few shapes, or raise torch._dynamo.config.recompile_limit)"
        ) from error
    except (CompileUnsupported, TorchDynamoException) as error:
        raise _refusal(_reason(getattr(error, "inner_exception", error))) from error
    finally:
        _current.reset(token)
    if outputs is not run.outputs:
        raise _refusal("torch.compile left it, or a part of it, as it was: is the compiler switched off?")
    return outputs


class _Graph:
    """The forward graph of a model as torch.compile traced it once, and the transpose of its backward graph."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], compiler: Compiler) -> None:
        # The first result is the model's; others are what it keeps. A copy is never a view, for whose base AOTAutograd
        # would ask a cotangent, nor an input.
        output = gm.graph.find_nodes(op="output")[0]
        first, *others = output.args[0]
        with gm.graph.inserting_before(output):
            output.args = ((gm.graph.call_method("clone", (first,)), *others),)
        gm.recompile()

        self.number = next(_numbers)
        self.active: list[int] = []  # the inputs that backward graph and transpose know
        self._compiler = compiler
        self._results = 1 + len(others)
        # Inputs that may move: buffers, and whatever else is not a parameter.
        self._movable = [not isinstance(x, torch.nn.Parameter) for x in inputs]
        self._written: list[int] | None = None  # the inputs that a run writes to; known after the first
        self._copies: dict[str, str] = {}  # results of the forward graph that stand for a residual of another name
        self._linear: fx.GraphModule | None = None
        self._residuals: list[str] = []  # names of what the transpose reads
        self._fake_mode: Any = None
        self._jvp: Callable[[list[Any]], Sequence[Any]] | None = None
        # Attention's fused backward kernel has no derivative, and so no transpose.
        with inductor_config.patch(fallback_random=True), sdpa_kernel(SDPBackend.MATH):
            self._function = aot_autograd(
                fw_compiler=self._compile_forward,
                bw_compiler=compiler,
                partition_fn=self._partition,
                decompositions=select_decomp_table(),
            )(gm, inputs)

    def __call__(self, *inputs: Any) -> Any:
        run = _current.get()
        assert run is not None
        run.graph, run.inputs = self, inputs
        for i in self.active:
            if not inputs[i].is_leaf:
                raise CompileUnsupported("it uses a tensor that was computed from parameters outside of model_fn")
        candidates = range(len(inputs)) if self._written is None else self._written
        before = {i: (inputs[i].detach().clone(), version_of(inputs[i])) for i in candidates if _is_plain(inputs[i])}
        results = self._function(*inputs)
        self._written = [i for i, (_, version) in before.items() if version_of(inputs[i]) != version]
        if run.replay is not None:
            for i in self._written:
                run.replay.was_written(inputs[i], before[i][0])
        if any(all(result is not x for x in inputs) for result in results[1:]):
            raise CompileUnsupported(SEVERAL)
        run.outputs = results[0]
        return results

    def jvp(self, values: dict[str, Any], directions: Sequence[Tensor]) -> Tensor:
        """J v, from a run's values and tangents of the active inputs."""
        arguments = [*map(values.__getitem__, self._residuals), *directions]
        if self._jvp is None:  # compiled here, where the strides of the residuals are known
            assert self._linear is not None
            examples = [
                self._fake_mode.from_tensor(a, static_shapes=True) if isinstance(a, Tensor) else a for a in arguments
            ]
            self._jvp = self._compiler(self._linear, examples)
            self._linear = self._fake_mode = None
        (tangent,) = self._jvp(arguments)
        assert isinstance(tangent, Tensor)
        return tangent

    def _partition(
        self, joint: fx.GraphModule, *args: Any, num_fwd_outputs: int, **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Forward and backward graph, with cheap residuals computed twice; takes the transpose of the second."""
        forward, backward = min_cut_rematerialization_partition(joint, *args, num_fwd_outputs=num_fwd_outputs, **kwargs)
        gradients = _results(backward)
        if len(gradients) != len(self._movable):
            raise CompileUnsupported("two of the tensors that it uses are views of the same memory, which it writes to")
        self.active = [i for i, gradient in enumerate(gradients) if gradient is not None]
        self._linear, self._residuals = transpose(backward)
        self._fake_mode = detect_fake_mode([gradients[i].meta["val"] for i in self.active])
        if not set(self._residuals) <= {getattr(node, "name", None) for node in _results(forward)}:
            raise CompileUnsupported("it draws random numbers inside a checkpointed part")
        if num_fwd_outputs > self._results:  # the run writes to inputs, new values of which come first
            arguments = forward.graph.find_nodes(op="placeholder")[-len(self._movable) :]
            movable = {node for node, moves in zip(arguments, self._movable, strict=True) if moves}
            self._copies = _own_residuals(forward, movable, num_fwd_outputs)
        return forward, backward

    def _compile_forward(self, graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[[list[Any]], Any]:
        names = [getattr(node, "name", "") for node in _results(graph)]
        names = [self._copies.get(name, name) for name in names]
        compiled = self._compiler(graph, examples)

        def forward(inputs: list[Any]) -> Sequence[Any]:
            values = compiled(inputs)
            run = _current.get()
            assert run is not None
            run.values = dict(zip(names, values, strict=True))
            return values

        return boxed(forward)


class Backend:
    """A backend for torch.compile, whose graphs are compiled by `compiler`."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> _Graph:
        """Return what torch.compile is to run in the place of a graph that it has traced."""
        return _Graph(gm, inputs, self._compiler)


def inductor(graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[[list[Any]], Sequence[Any]]:
    """Compile by Inductor, which keeps its results on disk; random numbers are those of uncompiled code."""
    announce(
        "compile",
        "curveball_fused: compiling the model and its Jacobian products, which may take minutes the first time; "
        "Inductor keeps the code on disk, so that later runs take seconds.",
    )
    with inductor_config.patch(fallback_random=True):
        return compile_fx_inner(graph, examples)


backend = Backend(inductor)


def _refusal(reason: str) -> NotTrainable:
    return NotTrainable(f"compile=True cannot follow this model: {reason}. Change that, or leave compile=True off.")


def _reason(error: BaseException) -> str:
    """Return what happened, without the compiler's hints about itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    details = ("Explanation: ", "Developer debug context: ")
    told = [lines[0], *(line.removeprefix(d) for line in lines[1:] for d in details if line.startswith(d))]
    return "; ".join(line.rstrip(".") for line in told)


def _results(graph: fx.GraphModule) -> Sequence[Any]:
    return tuple(graph.graph.find_nodes(op="output")[0].args[0])


def _own_residuals(forward: fx.GraphModule, movable: set[fx.Node], first: int) -> dict[str, str]:
    """Copy the residuals, results from `first` on, that lie in a movable input's memory; return names of the copies."""
    output = forward.graph.find_nodes(op="output")[0]
    results, copies = list(output.args[0]), {}
    for i, node in enumerate(results[first:], first):
        source = node
        while getattr(source.target, "is_view", False):
            source = source.args[0]
        if source in movable:
            with forward.graph.inserting_before(output):
                results[i] = forward.graph.call_function(torch.ops.aten.clone.default, (node,))
            results[i].meta = dict(node.meta)
            copies[results[i].name] = node.name
    output.args = (tuple(results),)
    forward.recompile()
    return copies


def _like(tangent: Tensor, p: Tensor) -> Tensor:
    """Return `tangent` in dtype and strides of `p`, for which the graphs are compiled."""
    if tangent.dtype == p.dtype and tangent.stride() == p.stride():
        return tangent
    return torch.empty_like(p, requires_grad=False).copy_(tangent)


def _is_plain(value: Any) -> bool:
    """Return whether the run may write to it, other than the optimizer's parameters."""
    return isinstance(value, Tensor) and not value.requires_grad
