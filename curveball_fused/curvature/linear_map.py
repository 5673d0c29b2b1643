"""What all methods of linearizing a model share: the linear map itself, checks of what a model returns, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from curveball_fused._torch_private import run_backward
from curveball_fused.replay import Unrepeatable

from .torch_modes import Decompose

ModelFn = Callable[[], Tensor]


class Pullback(Protocol):
    """The half of the Jacobian J = ∂f/∂w that one run of the model and autograd give: Jᵀ."""

    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        """Return `Jᵀ u`, in the parameters' shapes and dtypes; zero for a parameter that the model did not use.

        It may be called once, as the memory that it reads is freed on the way.
        """

    def without_graph(self) -> list[Tensor]:
        """Return what the run of the model has left, depends on the parameters, and has no graph that tells so."""
        return []


class LinearMap(Pullback, Protocol):
    """The Jacobian J of a model at its parameters, as products with vectors."""

    def jvp(self, tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return `(outputs, J v)`, both of the outputs' shape and dtype; `tangents` have the parameters' shapes."""

    @property
    def operators(self) -> frozenset[str]:
        """What the model consists of, as far as the method sees it; complete after the first product."""

    def compare_runs(self) -> None:
        """Compare the outputs of the runs of the model that follow with those of the first."""
        return

    def difference_of_runs(self) -> Tensor | None:
        """Return how far the compared outputs differ, relative, 0-dim float64; None where the model runs once."""
        return None


class MethodUnsupported(Exception):
    """One method cannot differentiate the model; the message says which, and why."""


class NotTrainable(RuntimeError):
    """The model cannot be trained as it is, by all that one method sees."""


def gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    every_call: bool = False,
    allow_unused: bool = True,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return what `torch.autograd.grad` returns.

    What checkpoints compute again in the backward pass is computed by the kernels of the forward pass.

    Args:
        outputs: of a run of the model, or of another backward pass.
        inputs: with respect to which they are differentiated.
        cotangents: of the outputs, and of their shapes.
        every_call: as it was given to `Decompose` for the forward pass.
        allow_unused: return None for inputs that were not used, instead of raising an error.
        retain_graph: keep the graph for another backward pass.
        create_graph: make a graph of this one.

    Returns:
        The gradients, in the shapes of the inputs.

    Raises:
        RuntimeError: of torch.
        reentrant_checkpoint: the outputs come from checkpoints without a graph.
    """
    flags = (retain_graph, create_graph, tuple(inputs), allow_unused)
    try:
        with Decompose(every_call):
            results: tuple[Tensor | None, ...] = run_backward(
                tuple(outputs), tuple(cotangents), *flags, accumulate_grad=False
            )
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise reentrant_checkpoint() from error
    return results


def evaluate(model_fn: ModelFn) -> Tensor:
    """Return the outputs alone, by the same kernels as in the Jacobian products, for the loss at the new weights."""
    torch.clear_autocast_cache()  # it may hold half-precision copies of the old weights
    # With gradients enabled, since a model may itself differentiate inside.
    with torch.enable_grad(), Decompose(every_call=False):
        return checked_outputs(model_fn()).detach()


def checked_outputs(outputs: Any) -> Tensor:
    """Return `outputs`, or raise an error that says what `model_fn` must return."""
    if not isinstance(outputs, Tensor):
        raise TypeError(
            "model_fn must return the predictions, a floating-point tensor or a structure of some; it returned "
            f"{type(outputs).__name__} without one."
        )
    if not outputs.is_floating_point():
        raise TypeError(f"model_fn must return a real floating-point tensor; it returned {outputs.dtype}.")
    return outputs


def in_own_memory(outputs: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Return `outputs`, copied where the model returned a parameter: the update must not change them."""
    memory = outputs.untyped_storage().data_ptr()
    return outputs.clone() if any(p.untyped_storage().data_ptr() == memory for p in params) else outputs


@contextmanager
def own_gradients(params: Sequence[Tensor]) -> Iterator[None]:
    """Refuse a backward pass that leaves gradients in the `.grad` of parameters, instead of returning them.

    That is what an `autograd.Function` does whose backward pass calls `.backward()`, as reversible layers are often
    written. What stood in `.grad` before stands there afterwards.

    Args:
        params: the parameters that are optimized.

    Yields:
        Nothing.

    Raises:
        RuntimeError: one of the parameters got a gradient.
    """
    before = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        yield
        if any(p.grad is not None for p in params):
            raise RuntimeError(
                "an autograd.Function in it calls .backward() inside its own backward pass, which leaves gradients in "
                ".grad where no Jacobian product can find them: let it return them, by torch.autograd.grad"
            )
    finally:
        for p, gradient in zip(params, before, strict=True):
            p.grad = gradient


def dense_gradients(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Return autograd's gradients with zeros for unused parameters; raise where all are unused, or one is sparse."""
    if all(g is None for g in gradients):
        raise independent_outputs()
    if any(g is not None and g.layout != torch.strided for g in gradients):
        raise NotTrainable("CurveBall does not support sparse gradients: construct the embedding with sparse=False.")
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, gradients, strict=True)]


def independent_outputs() -> NotTrainable:
    """Return the error for outputs that depend on no parameter."""
    return NotTrainable(
        "the output of model_fn does not depend on any parameter of this optimizer: pass the parameters of the model "
        "that model_fn calls, and don't detach its output or run it under torch.no_grad()."
    )


def reentrant_checkpoint() -> Unrepeatable:
    """Return the error for a model with checkpoints that no method can differentiate."""
    return Unrepeatable(
        "model_fn uses reentrant gradient checkpointing, through which a step cannot go: call "
        "torch.utils.checkpoint.checkpoint with use_reentrant=False."
    )


def lost_tangent() -> RuntimeError:
    """Return the error for a parameter that has a gradient but whose tangent never reached a torch call."""
    return RuntimeError(
        "the tangent of a parameter was lost: model_fn detaches what comes of it, or uses it inside code that torch "
        "functions cannot see into, such as a torch.jit-scripted or traced module or a custom autograd.Function. Call "
        'the original Python module in model_fn, or construct CurveBall with curvature="double_backward".'
    )


def relative_difference(a: Tensor, b: Tensor) -> Tensor:
    """Return |a - b| / |b|, 0-dim float64 on the device; infinite for two shapes, 0 where both are 0."""
    if a.shape != b.shape:
        return torch.full((), torch.inf, dtype=torch.float64, device=b.device)
    difference, size = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in (a.double() - b.double(), b))
    return torch.where(difference == 0, difference, difference / size)
