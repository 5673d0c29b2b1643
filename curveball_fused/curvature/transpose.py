"""The transpose of a backward graph.

A backward graph computes gradients Jᵀu from a cotangent u and residuals; it is linear in u. Its derivative with respect
to u, pulled back from v, is Jv: each operation on the way is replaced by its own transpose (a product by a matrix by
that with its transpose, a sum by an expansion, a gather by a scatter), and reads the same residuals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from curveball_fused._torch_private import OpOverload
from curveball_fused._torch_private.compiler import detect_fake_mode, fx_graph_cse, select_decomp_table

from .torch_modes import first_line

SEVERAL = (
    "it returns more than one tensor, or keeps one beyond its run (assigns a new tensor to a buffer or attribute, "
    "where it should write to it in place)"
)


class CompileUnsupported(Exception):
    """The model does what the compiled step cannot follow; the uncompiled one can."""


def transpose(backward: fx.GraphModule) -> tuple[fx.GraphModule, list[str]]:
    """Jv as a graph, of a backward graph as AOTAutograd's partitioners make it.

    Args:
        backward: (residuals, u) → gradients, None for what needs none.

    Returns:
        A graph (residuals, v) → (Jv,), with one v for each gradient that is not None, and the names of the residuals.

    Raises:
        CompileUnsupported: an operation has no derivative, or the graph is not linear in u.
    """
    arguments = backward.graph.find_nodes(op="placeholder")
    cotangents = [node for node in arguments if node.name.startswith("tangents")]
    residuals = [node for node in arguments if node not in cotangents]
    gradients = [node for node in backward.graph.find_nodes(op="output")[0].args[0] if node is not None]
    if len(cotangents) != 1:
        raise CompileUnsupported(SEVERAL)

    def pull_back(saved: Sequence[Any], u: Tensor, v: Sequence[Tensor]) -> tuple[Tensor, ...]:
        given = dict(zip(residuals, saved, strict=True)) | {cotangents[0]: u.detach().requires_grad_()}
        with torch.enable_grad():
            results = _Differentiable(backward).run(*map(given.__getitem__, arguments))
            pairs = [(r, t) for r, t in zip((r for r in results if r is not None), v, strict=True) if r.requires_grad]
            return torch.autograd.grad([r for r, _ in pairs], given[cotangents[0]], [t for _, t in pairs])

    examples = [node.meta["val"] for node in (*residuals, *cotangents, *gradients)]
    saved, u, v = examples[: len(residuals)], examples[len(residuals)], examples[len(residuals) + 1 :]
    fake_mode = detect_fake_mode(examples)
    assert fake_mode is not None
    try:
        with fake_mode, torch.no_grad():
            traced = make_fx(pull_back, decomposition_table=select_decomp_table())(
                saved, u, [torch.empty_like(g) for g in v]
            )
    except (NotImplementedError, RuntimeError) as error:
        raise CompileUnsupported(first_line(error)) from error
    linear = fx.GraphModule(traced, fx_graph_cse(traced.graph))
    linear.graph.eliminate_dead_code()
    unused = linear.graph.find_nodes(op="placeholder")[len(residuals)]
    if unused.users:
        raise CompileUnsupported("its backward pass is not linear in the cotangent")
    linear.graph.erase_node(unused)
    linear.graph.set_codegen(fx.graph.CodeGen())  # plain arguments, instead of those of `pull_back`
    linear.recompile()
    return linear, [node.name for node in residuals]


# Primitives that torch's compiler decomposes to, and that autograd has no formula for.
_PRIMITIVES: dict[str, Callable[..., Tensor]] = {
    "prims::convert_element_type": lambda x, dtype: x.to(dtype),
    "prims::fma": lambda a, b, c: a * b + c,
}


class _Differentiable(fx.Interpreter):
    """Runs a graph with what autograd can differentiate."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = target.name() if isinstance(target, OpOverload) else ""
        return super().call_function(_PRIMITIVES.get(name, target), args, kwargs)
