"""One room for torch's private interface: nobody else reaches into it, and all that the room offers works here."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import nn
from torch.utils.checkpoint import checkpoint

import curveball_fused
from curveball_fused import _torch_private as private

PACKAGE = Path(curveball_fused.__file__).parent
ROOM = PACKAGE / "_torch_private"
# Attributes of torch's objects that are nobody's business, whatever the object is called.
ATTRIBUTES = frozenset(("_version", "_base", "_buffers", "_backward_hooks", "_schema"))


def is_private(name: str) -> bool:
    """Whether a part of a dotted name is private."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` as it stands; nothing for other expressions."""
    if isinstance(node, ast.Name):
        return node.id
    owner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{owner}.{node.attr}" if owner else ""  # type: ignore[attr-defined]


def reaches(source: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that reach into torch's private interface, and what they reach for."""
    tree = ast.parse(source)
    torchs = {"torch"}  # names that stand for a module of torch's
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    torchs.add(alias.asname or "torch")
                    if is_private(alias.name):
                        yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                torchs.add(alias.asname or alias.name)
                if is_private(f"{node.module}.{alias.name}"):
                    yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            chain = dotted(node)
            of_torch = chain.split(".")[0] in torchs and is_private(node.attr)
            if of_torch or node.attr in ATTRIBUTES:
                yield node.lineno, chain or f"….{node.attr}"


def test_only_the_room_reaches_into_torch() -> None:
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if ROOM not in path.parents
        for line, name in reaches(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join([*found, "torch's private interface belongs into curveball_fused/_torch_private."])


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from torch._C import DisableTorchFunction", "torch._C.DisableTorchFunction"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("from torch import _foreach_mul", "torch._foreach_mul"),
        ("import torch._dynamo", "torch._dynamo"),
        ("import torch; torch.ops.aten._to_copy(x)", "torch.ops.aten._to_copy"),
        ("import torch.nn.functional as F; F._scaled(x)", "F._scaled"),
        ("import torch.autograd.forward_ad as fwAD; fwAD._set(True)", "fwAD._set"),
        ("from torch import nn; nn.Module._call_impl", "nn.Module._call_impl"),
        ("def f(t): return t._version", "t._version"),
        ("def f(t): return t()._base", "….…"),
    ],
)
def test_a_reach_is_told(line: str, name: str) -> None:
    told = [what for _, what in reaches(f"\n{line}\n")]
    assert len(told) == 1 and (told[0] == name or name == "….…")
    assert [at for at, _ in reaches(f"\n{line}\n")] == [2]


def test_what_is_public_is_not_told() -> None:
    assert not list(reaches("import torch\nself._x = torch.ones(3).__add__(1)\ntorch.nn.functional.relu(self._x)"))


# ---------------------------------------------------------------------------------------------- what the room offers


X = torch.ones(2, 3)


def hooked() -> bool:
    p = nn.Parameter(X.clone())
    before = private.has_gradient_hooks(p)
    p.register_hook(lambda g: g)
    return private.has_gradient_hooks(p) and not before


def saved_tensors_hooked() -> bool:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        inside = private.has_saved_tensor_hooks()
    return inside and not private.has_saved_tensor_hooks()


def recomputation_wrapped() -> bool:
    calls = []

    def wrap(recompute: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: (calls.append(1), recompute(*args))[1]

    with private.recomputations_wrapped(wrap):
        out = checkpoint(torch.sin, X.clone().requires_grad_(), use_reentrant=False)
    out.sum().backward()
    return calls == [1]


def kept_versions() -> bool:
    x = X.clone()
    before = private.version_of(x)
    with private.versions_kept([x]):
        x.mul_(2)
    return private.version_of(x) == before


def sharded() -> bool:
    """A DTensor is, without elements too; tests/optimizer/test_sharded_parameters.py has all kinds."""
    from torch.distributed.fsdp._common_utils import FSDP_FLATTENED

    return hasattr(torch.distributed.tensor.DTensor, "device_mesh") and FSDP_FLATTENED == "_fsdp_flattened"


def stepped() -> bool:
    optimizer = torch.optim.SGD([nn.Parameter(X.clone())], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    private.mark_as_stepped(optimizer)
    scheduler.step()  # which warns otherwise
    return True


def unscaled() -> bool:
    p = nn.Parameter(torch.ones(()))
    p.grad = torch.ones(())
    optimizer, scaler = torch.optim.SGD([p]), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    before = id(optimizer) in private.scaled_optimizers(scaler)
    scaler.unscale_(optimizer)
    return id(optimizer) in private.scaled_optimizers(scaler) and not before


def forward_grad_switched() -> bool:
    with private.set_forward_grad_enabled(False):
        off = not private.forward_grad_enabled()
    return off and private.forward_grad_enabled()


def dual_level_is_open() -> bool:
    with fwAD.dual_level():
        inside = private.in_dual_level()
    return inside and not private.in_dual_level()


def in_transform() -> bool:
    seen: list[bool] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(private.in_functorch_transform() and private.is_functorch_wrapped(x))
        return x

    torch.func.vmap(function)(X)
    return seen == [True] and not private.in_functorch_transform() and not private.is_functorch_wrapped(X)


def dual() -> bool:
    with private.dual_level():
        return torch.equal(fwAD.unpack_dual(fwAD.make_dual(X, 2 * X)).tangent, 2 * X)


def versions() -> bool:
    t = X.clone()
    before = private.version_of(t)
    t.add_(1)
    return bool(private.version_of(t) == before + 1)


def dispatch_seen() -> bool:
    class Mode(private.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(private.schema_of(func).name)
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Mode():
        X.sin()
    return names == ["aten::sin"]


def operators_seen_without_the_compiler() -> bool:
    program = """
import sys, torch
from curveball_fused._torch_private import OperatorMode
class Mode(OperatorMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {})) + 1
with Mode():
    assert torch.zeros(()).sin() == 1
assert "torch._dynamo" not in sys.modules
"""
    return subprocess.run([sys.executable, "-c", program]).returncode == 0


def functions_disabled() -> bool:
    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return "own"

    own = X.as_subclass(Own)
    with private.DisableTorchFunction():
        plain = own.sum()
    return own.sum() == "own" and isinstance(plain, torch.Tensor)


def attention_for_cpu() -> bool:
    q = torch.randn(1, 1, 4, 8)
    results = private.flash_attention_for_cpu(q, q, q)
    grads = private.flash_attention_for_cpu_backward(q, q, q, q, *results[:2], 0.0, False)
    return len(grads) == 3 and results[0].shape == q.shape


def hooks_set_aside() -> bool:
    leaf = torch.ones(2, requires_grad=True)
    leaf.register_hook(lambda g: 10 * g)
    with private.gradient_hooks_set_aside([leaf]):
        aside = torch.autograd.grad(leaf.sum(), leaf)[0]
    return float(aside[0]) == 1 and float(torch.autograd.grad(leaf.sum(), leaf)[0][0]) == 10


def cache_emptied() -> bool:
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with torch.nn.utils.parametrize.cached():
        first = layer.weight
        kept = layer.weight is first
        private.forget_cached_parametrizations()
        return kept and layer.weight is not first


def copied_at_once() -> bool:
    targets = [torch.zeros(2), torch.zeros(3, 4).T]
    private.foreach_copy_(targets, [torch.ones(2), 2 * torch.ones(4, 3)])
    return bool((targets[0] == 1).all() and (targets[1] == 2).all())


def added_at_once() -> bool:
    targets = [torch.ones(2), torch.zeros(3)]
    private.foreach_add_(targets, [torch.ones(2), torch.ones(3)], alpha=2)
    private.foreach_mul_(targets, torch.tensor(0.5, dtype=torch.float64))
    return bool((targets[0] == 1.5).all() and (targets[1] == 1).all())


def joined() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            wrapper = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
            before = private.is_in_join(wrapper)
            with wrapper.join():
                return private.is_in_join(wrapper) and not before
        finally:
            torch.distributed.destroy_process_group()


def run_backward() -> bool:
    x = torch.ones(2, requires_grad=True)
    (g,) = private.run_backward((x.square().sum(),), (torch.ones(()),), False, False, (x,), True, accumulate_grad=False)
    return bool((g == 2).all()) and x.grad is None


CALLS: dict[str, Callable[[], Any]] = {
    "DisableTorchFunction": functions_disabled,
    "OpOverload": lambda: isinstance(torch.ops.aten.sin.default, private.OpOverload),
    "OpOverloadPacket": lambda: isinstance(torch.ops.aten.sin, private.OpOverloadPacket),
    "TorchDispatchMode": dispatch_seen,
    "OperatorMode": operators_seen_without_the_compiler,
    "base_of": lambda: private.base_of(X[0]) is X and private.base_of(X) is None,
    "buffers_of": lambda: set(private.buffers_of(nn.BatchNorm1d(3))) >= {"running_mean", "running_var"},
    "checks_errors": lambda: private.checks_errors(torch.zeros((), dtype=torch.int32), "inv", is_matrix=True) is None,
    "copies_to": lambda: private.copies_to(X, dtype=torch.float64).dtype == torch.float64,
    "disable_dynamo": lambda: private.disable_dynamo(lambda: True)(),
    "dual_level": dual,
    "flash_attention_for_cpu": attention_for_cpu,
    "flash_attention_for_cpu_backward": attention_for_cpu,
    "foreach_add_": added_at_once,
    "foreach_copy_": copied_at_once,
    "foreach_mul": lambda: torch.equal(private.foreach_mul([X], torch.tensor(2.0))[0], 2 * X),
    "foreach_mul_": added_at_once,
    "foreach_norm": lambda: torch.equal(private.foreach_norm([X, 3 * X])[1], torch.linalg.vector_norm(3 * X)),
    "forget_cached_parametrizations": cache_emptied,
    "forward_grad_enabled": forward_grad_switched,
    "gradient_hooks_set_aside": hooks_set_aside,
    "has_gradient_hooks": hooked,
    "has_saved_tensor_hooks": saved_tensors_hooked,
    "in_dual_level": dual_level_is_open,
    "in_functorch_transform": in_transform,
    "is_functorch_wrapped": in_transform,
    "is_in_join": joined,
    "is_sharded": sharded,
    "mark_as_stepped": stepped,
    "parameters_of": lambda: list(private.parameters_of(nn.Linear(2, 3))) == ["weight", "bias"],
    "recomputations_wrapped": recomputation_wrapped,
    "run_backward": run_backward,
    "safe_softmax": lambda: not private.safe_softmax(torch.full((2, 3), -torch.inf), -1).any(),
    "scaled_optimizers": unscaled,
    "schema_of": lambda: private.schema_of(torch.ops.aten.sin.default).name == "aten::sin",
    "set_forward_grad_enabled": forward_grad_switched,
    "softmax_backward": lambda: private.softmax_backward(X, X.softmax(1), 1, X.dtype).abs().max() < 1e-6,
    "storage_identity": lambda: private.storage_identity(X) == private.storage_identity(X[1:]),
    "tree_flatten": lambda: private.tree_flatten([1, (2, {"a": 3})])[0] == [1, 2, 3],
    "tree_leaves": lambda: private.tree_leaves([1, (2, {"a": 3})]) == [1, 2, 3],
    "tree_map": lambda: private.tree_map(lambda n: n + 1, [1, (2,)]) == [2, (3,)],
    "version_of": versions,
    "versions_kept": kept_versions,
    "weight_norm": lambda: private.weight_norm(X, torch.ones(2, 1), 0).shape == X.shape,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", private.__all__)
def test_it_works_on_this_torch(name: str) -> None:
    assert hasattr(private, name)
    assert CALLS[name]()


def test_every_call_is_of_a_name_that_the_room_offers() -> None:
    assert set(CALLS) == set(private.__all__)


def test_what_the_compiler_is_made_of_is_there() -> None:
    room = importlib.import_module("curveball_fused._torch_private.compiler")
    assert all(getattr(room, name) is not None for name in room.__all__)
    assert room.recompile_limit() > 0 and room.boxed(lambda values: values)._boxed_call
