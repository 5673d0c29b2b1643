"""Jacobian products: the two identities that the method rests on, replays, and what becomes of awkward models."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curveball_fused import CurveBall, dual_rules
from curveball_fused.curvature import DoubleBackward, Forward
from curveball_fused.replay import Replay

MODES = [Forward, DoubleBackward]


def linearised(mode: Any, model_fn: Callable[[], Tensor], params: list[Tensor]) -> Any:
    return mode(model_fn, params, Replay(params, params[0].device))


def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(u * v).sum() for u, v in zip(a, b, strict=True)]).sum()


def products(
    mode: Any, model: nn.Module, x: Tensor
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, list[Tensor], Tensor]:
    params = list(model.parameters())
    torch.manual_seed(3)
    z = [torch.randn_like(p) for p in params]
    map_ = linearised(mode, lambda: model(x), params)
    outputs, jz = map_.jvp(z)
    u = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(4), dtype=outputs.dtype)
    r = map_.vjp(u)
    return outputs, jz, r, map_.jvp(r)[1], z, u


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(nets.NETS))
def test_adjoint_identities(name: str, mode: Any) -> None:
    """z·Jᵀu = Jz·u and |Jᵀu|² = J Jᵀu·u: without them, no dot product could be taken in the output space."""
    _, jz, r, jr, z, u = products(mode, *nets.make(name))
    torch.testing.assert_close(dot(z, r), (jz * u).sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dot(r, r), (jr * u).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(nets.NETS))
def test_modes_agree(name: str) -> None:
    ours, expected = (products(mode, *nets.make(name)) for mode in MODES)
    for a, b in zip(ours[:2] + (ours[3],), expected[:2] + (expected[3],), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours[2], expected[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def finite_difference(model_fn: Callable[[], Tensor], params: list[Tensor], z: list[Tensor], h: float = 1e-6) -> Tensor:
    values = []
    for sign in (1, -1):
        torch._foreach_add_(params, z, alpha=sign * h)
        values.append(model_fn())
        torch._foreach_add_(params, z, alpha=-sign * h)
    return (values[0] - values[1]) / (2 * h)


RULED = {
    "linear without bias": lambda: (nn.Linear(4, 3, bias=False), torch.randn(2, 4)),
    "linear of a vector": lambda: (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(4)),
    "linear of a transposed input": lambda: (
        nn.Sequential(nn.Linear(4, 3), nn.Flatten(0, 1), nn.Linear(3, 2)),
        torch.randn(4, 3, 2).permute(2, 1, 0),
    ),
    "batch norm": lambda: (nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), torch.randn(4, 2, 3, 3)),
    "batch norm, channels last": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)),
        torch.randn(4, 2, 3, 3).to(memory_format=torch.channels_last),
    ),
    "batch norm without statistics": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)),
        torch.randn(5, 3),
    ),
    "batch norm without affine": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)),
        torch.randn(5, 3),
    ),
    "batch norm in eval mode": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(),
        torch.randn(5, 3),
    ),
    "layer norm": lambda: (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), torch.randn(5, 3)),
    "layer norm without bias": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, bias=False)),
        torch.randn(5, 3),
    ),
    "layer norm over two dimensions": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.LayerNorm((5, 4))),
        torch.randn(2, 5, 3),
    ),
    "softmax": lambda: (nn.Sequential(nn.Linear(3, 4), nn.Softmax(1)), torch.randn(5, 3)),
    "max pooling": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 1), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(2)),
        torch.randn(2, 2, 9, 8),
    ),
    "max pooling, channels last, dilated": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 1), nn.MaxPool2d(2, 1, dilation=2)),
        torch.randn(2, 2, 7, 6).to(memory_format=torch.channels_last),
    ),
    "max pooling of one image": lambda: (nn.Sequential(nn.Conv2d(2, 3, 1), nn.MaxPool2d(2)), torch.randn(2, 4, 4)),
    "group norm": lambda: (nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4)), torch.randn(2, 2, 3, 3)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(RULED))
def test_rules_against_finite_differences(name: str, mode: Any) -> None:
    model, x = RULED[name]()
    model, x = model.double(), x.double()
    for p in model.parameters():
        nn.init.normal_(p)
    outputs, jz, r, jr, z, u = products(mode, model, x)
    params = list(model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(outputs, model(x))
        torch.testing.assert_close(jz, finite_difference(lambda: model(x), params, z), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(jr, finite_difference(lambda: model(x), params, r), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dot(r, r), (jr * u).sum(), rtol=1e-12, atol=1e-12)


def test_every_rule_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions that torch's own modules call are those that the rules are kept under."""
    called = set()
    for function, rule in list(dual_rules.RULES.items()):

        def call(*args: Any, _function: Any = function, _rule: Any = rule, **kwargs: Any) -> Any:
            result = _rule(*args, **kwargs)
            if result is not NotImplemented:
                called.add(_function)
            return result

        monkeypatch.setitem(dual_rules.RULES, function, call)
    for name in ("convolution + batch norm", "attention"):
        model, x = nets.make(name)
        products(Forward, model, x)
    for name in ("softmax", "layer norm"):
        products(Forward, *RULED[name]())
    products(Forward, TiedWithPadding(), torch.tensor([0, 3]))
    assert called == set(dual_rules.RULES)


class TiedWithPadding(nn.Module):
    """The padding row gets no gradient as input, and one as output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3, padding_idx=-1)
        nn.init.normal_(self.embedding.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.embedding(tokens)) @ self.embedding.weight.T


def test_padding_index_gets_no_tangent_as_it_gets_no_gradient() -> None:
    tokens = torch.tensor([[0, 4, 3], [4, 4, 1]])
    torch.manual_seed(0)
    model = TiedWithPadding().double()
    ours, expected = (products(mode, model, tokens) for mode in MODES)
    for i in (0, 1, 3):
        torch.testing.assert_close(ours[i], expected[i], rtol=1e-12, atol=1e-12)


def causal(q: Tensor) -> dict[str, Any]:
    return dict(is_causal=True)


def boolean(q: Tensor) -> dict[str, Any]:
    mask = torch.rand(q.shape[-2], q.shape[-2]) > 0.4
    mask[1] = False  # a row that sees nothing
    return dict(attn_mask=mask)


def additive(q: Tensor) -> dict[str, Any]:
    return dict(attn_mask=torch.randn(q.shape[-2], q.shape[-2], dtype=q.dtype), scale=0.3)


@pytest.mark.parametrize("options", [causal, boolean, additive])
def test_attention_rule(options: Any) -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    layer = nn.Linear(6, 18, dtype=torch.float64)
    keywords = options(x)

    def model() -> Tensor:
        q, k, v = layer(x).unflatten(2, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, **keywords)

    params = list(layer.parameters())
    z = [torch.randn_like(p) for p in params]
    outputs, jz = linearised(Forward, model, params).jvp(z)
    with torch.no_grad():
        torch.testing.assert_close(outputs, model())
        torch.testing.assert_close(jz, finite_difference(model, params, z), rtol=1e-6, atol=1e-8)


class Stateful(nn.Module):
    """Changes buffers in every way: batch norm, in place, through views, by assignment; draws from three generators."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", torch.zeros(2, 4))
        self.register_buffer("average", torch.zeros(4))
        self.generator = torch.Generator().manual_seed(7)
        self.calls: Tensor
        self.table: Tensor
        self.average: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x))
        y += self.table[0]  # in place on what the run computed itself
        with torch.no_grad():
            self.calls += 1
            self.table[0] += y.mean(0)  # twice, through two views of the same memory
            self.table[0] *= 0.5
            self.average = 0.9 * self.average + 0.1 * y.mean(0)
        noise = torch.rand(4, generator=self.generator, dtype=y.dtype)
        return F.dropout(y, 0.3) * (1 + random.random()) * self.table[0] * noise + self.average


@pytest.mark.parametrize("curvature", ["forward", "double_backward"])
@pytest.mark.parametrize("interval", [1, 1000])
def test_a_step_leaves_what_one_run_leaves(curvature: str, interval: int) -> None:
    model, x = Stateful().double(), torch.randn(6, 3, dtype=torch.float64)
    optimizer = CurveBall(model.parameters(), curvature=curvature, lambda_interval=interval, lr=0.7)
    for step in range(3):
        once = copy.deepcopy(model)
        once.generator.set_state(model.generator.get_state())
        random.seed(step)
        torch.manual_seed(step)
        with torch.no_grad():
            expected = once(x)
        drawn = torch.rand(2), random.random()
        random.seed(step)
        torch.manual_seed(step)
        _, outputs = optimizer.step(lambda: model(x), lambda out: out.square().mean())
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(torch.rand(2), drawn[0]) and random.random() == drawn[1]
        for (name, ours), theirs in zip(model.named_buffers(), once.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
            assert not ours.requires_grad
        assert torch.equal(model.generator.get_state(), once.generator.get_state())


def test_ratio_compares_the_same_function() -> None:
    """γ tends to 1 as the step tends to 0, but only if dropout and buffers are the same at both points."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    optimizer = CurveBall(model.parameters(), lr=1e-7, lambda_interval=1)
    for _ in range(3):
        optimizer.step(lambda: model(x), lambda out: out.square().mean())
        assert optimizer.stats()["ratio"].item() == pytest.approx(1, abs=1e-5)


def test_a_value_cached_in_the_first_run_survives() -> None:
    """A tensor that the run itself makes and fills in place must not be put back to what it was while half made."""
    layer, cache = nn.Linear(3, 3), {}

    def model() -> Tensor:
        if "mask" not in cache:
            cache["mask"] = torch.ones(3, 3).triu_()
        return layer(torch.eye(3)) * cache["mask"]

    CurveBall(layer.parameters()).step(model, lambda out: out.square().mean())
    assert torch.equal(cache["mask"], torch.ones(3, 3).triu())


def test_no_grad_inside_the_model_stops_both_products() -> None:
    first, second = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)

    def model() -> Tensor:
        with torch.no_grad():
            features = first(x)
        return second(torch.tanh(features + first(x).detach()))

    params = [*first.parameters(), *second.parameters()]
    z = [torch.randn_like(p) for p in params]
    map_ = linearised(Forward, model, params)
    _, jz = map_.jvp(z)
    u = torch.randn_like(jz)
    r = map_.vjp(u)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in r[:2])
    torch.testing.assert_close(dot(z, r), (jz * u).sum(), rtol=1e-12, atol=1e-12)


def test_a_model_that_differentiates_inside() -> None:
    """Physics-informed nets and energy models call torch.autograd.grad in their forward pass."""
    t = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None].requires_grad_()
    results = []
    for curvature in ("forward", "double_backward"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()

        def model(net: nn.Module = net) -> Tensor:
            u = net(t) + t**2
            (du,) = torch.autograd.grad(u.sum(), t, create_graph=True)
            return du + u

        optimizer = CurveBall(net.parameters(), curvature=curvature, lambda_interval=1)
        for _ in range(3):
            optimizer.step(model, lambda out: out.square().mean())
        results.append(torch.stack(list(optimizer.stats().values())))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def test_a_view_made_before_the_step_is_refused() -> None:
    weight, layer = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 3)
    view = weight.t()
    optimizer = CurveBall([weight, *layer.parameters()])
    with pytest.raises(RuntimeError, match="view of a parameter"):
        optimizer.step(lambda: layer(torch.eye(3)) @ weight @ view, lambda out: out.square().mean())


def test_checkpointed_batch_norm_moves_its_statistics_once() -> None:
    for curvature in ("forward", "double_backward"):
        model, x = (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double(),
            torch.randn(6, 3).double(),
        )
        optimizer = CurveBall(model.parameters(), curvature=curvature)

        def run(model: nn.Module = model, x: Tensor = x) -> Tensor:
            outputs: Tensor = checkpoint(model, x, use_reentrant=False)
            return outputs

        for _ in range(2):
            optimizer.step(run, lambda out: out.square().mean())
        assert model[1].num_batches_tracked == 2


def test_functorch_inside_the_model() -> None:
    layer, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    one_step_equals_double_backward(
        lambda: (copy.deepcopy(layer), lambda model: torch.func.vmap(lambda row: torch.tanh(model(row)))(x))
    )


def one_step_equals_double_backward(
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]],
) -> list[str]:
    """Two steps by "auto" against two steps by double backward; returns what was announced."""
    stats, messages = [], []
    for curvature in ("auto", "double_backward"):
        torch.manual_seed(0)
        model, run = make()
        optimizer = CurveBall(model.parameters(), curvature=curvature)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                torch.manual_seed(1)
                optimizer.step(lambda model=model, run=run: run(model), lambda out: out.square().mean())
        messages.append([str(w.message) for w in caught if "curveball_fused" in str(w.message)])
        stats.append(torch.stack([v for k, v in optimizer.stats().items() if k != "ratio"]))
    torch.testing.assert_close(stats[0], stats[1], rtol=1e-8, atol=1e-8)
    return messages[0]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers(kind: Any, p: float) -> None:
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    messages = one_step_equals_double_backward(
        lambda: (kind(3, 5, num_layers=2, dropout=p).double(), lambda model: model(x)[0])
    )
    assert len(messages) == 1 and "a plain one" in messages[0]


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_transformer_layer(p: float) -> None:
    x = torch.randn(4, 2, 8, dtype=torch.float64)
    one_step_equals_double_backward(
        lambda: (nn.TransformerEncoderLayer(8, 2, 16, dropout=p).double(), lambda model: model(x))
    )


def test_attention_with_dropout() -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64)

    def run(layer: nn.Module) -> Tensor:
        q, k, v = layer(x).unflatten(2, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)

    one_step_equals_double_backward(lambda: (nn.Linear(6, 18).double(), run))


class Scale(torch.autograd.Function):
    """A custom function without a forward-mode formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum(0)


class Custom(nn.Module):
    def __init__(self, linear_first: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.weight = nn.Parameter(torch.randn(3))
        self.linear_first = linear_first

    def forward(self, x: Tensor) -> Tensor:
        return (
            Scale.apply(self.linear(x), self.weight) if self.linear_first else self.linear(Scale.apply(x, self.weight))
        )


@pytest.mark.parametrize("linear_first", [True, False])
def test_retreat_to_double_backward_is_announced(linear_first: bool) -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    messages = one_step_equals_double_backward(lambda: (Custom(linear_first).double(), lambda model: model(x)))
    assert len(messages) == 1 and "double backward" in messages[0] and "Function" in messages[0]


def test_forward_by_name_does_not_retreat() -> None:
    model, x = Custom(True), torch.randn(4, 3)
    optimizer = CurveBall(model.parameters(), curvature="forward")
    with pytest.raises(RuntimeError, match='curvature="auto"'):
        optimizer.step(lambda: model(x), lambda out: out.square().mean())


@pytest.mark.filterwarnings("ignore:curveball_fused")
def test_a_checkpoint_does_not_choose_the_curvature_that_was_named() -> None:
    x = torch.randn(4, 3)
    model = Custom(True)
    optimizer = CurveBall(model.parameters())
    optimizer.step(lambda: model(x), lambda out: out.square().mean())
    named = CurveBall(model.parameters(), curvature="forward")
    named.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match='curvature="forward" cannot'):
        named.step(lambda: model(x), lambda out: out.square().mean())


class Opaque(torch.autograd.Function):
    """Neither a forward-mode formula nor a differentiable backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.filterwarnings("ignore:curveball_fused")
def test_nothing_left_to_retreat_to() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="neither forward mode nor double backward"):
        CurveBall(layer.parameters()).step(lambda: Opaque.apply(layer(torch.ones(2, 3))), lambda out: out.mean())


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
def test_scripted_module_is_refused() -> None:
    inner, outer = nn.Linear(3, 3), nn.Linear(3, 2)
    scripted = torch.jit.script(inner)
    optimizer = CurveBall([*outer.parameters(), *inner.parameters()])
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(RuntimeError, match="tangent of a parameter was lost"):
        optimizer.step(lambda: outer(scripted(torch.ones(2, 3))), lambda out: out.square().mean())
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
def test_reading_a_dtype_is_not_using_a_parameter() -> None:
    inner, outer = nn.Linear(3, 3), nn.Linear(3, 2)
    scripted = torch.jit.script(inner)
    optimizer = CurveBall([*outer.parameters(), *inner.parameters()])

    def model() -> Tensor:
        weight = inner.weight
        assert weight.requires_grad and weight.size(0) == 3 and weight.dim() == 2 and weight.numel() == 9
        return outer(scripted(torch.ones(2, 3, dtype=weight.dtype) + inner.bias.shape[0]))

    with pytest.raises(RuntimeError, match="tangent of a parameter was lost"):
        optimizer.step(model, lambda out: out.square().mean())


def test_compiled_module_runs_as_written() -> None:
    stats = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)), torch.randn(5, 3)
        module = torch.compile(model, backend="eager") if compiled else model
        optimizer = CurveBall(model.parameters())
        for _ in range(3):
            optimizer.step(lambda module=module, x=x: module(x), lambda out: out.square().mean())
        stats.append(torch.stack(list(optimizer.stats().values())))
    assert torch.equal(*stats)


def test_distributed_wrapper_is_refused(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(layer)
        with pytest.raises(RuntimeError, match=r"\.module"):
            CurveBall(layer.parameters()).step(lambda: wrapped(torch.ones(1, 3)), lambda out: out.mean())
    finally:
        torch.distributed.destroy_process_group()
