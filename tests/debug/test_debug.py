"""Debug mode: silent on what is right, at kinks and in float32 too; a mistake anywhere is caught and named."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall, ops
from curveball_fused.curvature import AUTO, dual_rules, rules
from curveball_fused.curvature.dual_numbers import DualNumbers
from curveball_fused.curvature.linearized import Linearized
from curveball_fused.curvature.rules import RuleContext
from curveball_fused.losses import loss_model as losses
from tests.helpers import nets
from tests.helpers.traceable_models import FOLLOWED, X


def square(outputs: Tensor) -> Tensor:
    return (outputs - 0.3).square().mean()


def debug(
    net: nn.Module, model_fn: Callable[[], Tensor], curvature: str = "auto", loss: Any = square, steps: int = 2
) -> CurveBall:
    optimizer = CurveBall(net.parameters(), curvature=curvature, lambda_interval=1, debug=True)
    for _ in range(steps):
        optimizer.step(model_fn, loss)
    return optimizer


@pytest.mark.parametrize("name", list(FOLLOWED))
def test_no_alarm_on_what_the_tape_follows(name: str) -> None:
    make, run = FOLLOWED[name]
    net = make().double()
    if not any(p.requires_grad for p in net.parameters()):
        net.bias.requires_grad_()
    debug(net, lambda: run(net))


@pytest.mark.parametrize("curvature", AUTO)
@pytest.mark.parametrize("name", list(nets.NETS))
def test_no_alarm_by_any_method(name: str, curvature: str) -> None:
    net, x = nets.make(name)
    debug(net, lambda: net(x), curvature, lambda out: F.cross_entropy(out, torch.zeros(len(out), dtype=torch.int64)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.inner(x) + x))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(11, 16, padding_idx=0), nn.Linear(16, 5)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, activation="gelu")

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.block(self.words(tokens), src_key_padding_mask=tokens == 0)).mean(1)


@pytest.mark.parametrize("curvature", AUTO)
@pytest.mark.parametrize(
    ("make", "x"),
    [
        (Residual, torch.linspace(-3, 3, 8 * 3 * 64).sin().view(8, 3, 8, 8)),
        (Transformer, (torch.arange(40) * 7 % 11).view(8, 5)),
    ],
)
def test_no_alarm_in_float32(make: Callable[[], nn.Module], x: Tensor, curvature: str) -> None:
    net = make()
    debug(net, lambda: net(x), curvature, lambda out: F.cross_entropy(out, torch.arange(8) % 5), steps=3)


def at_kinks(net: nn.Module) -> Tensor:
    x = F.relu(F.linear(torch.zeros_like(X), net.weight)) + net(X)
    x = x.masked_fill(X > 0.5, torch.finfo(x.dtype).min).clamp(min=-1.0)
    y = F.max_pool1d(F.relu(x - 1000)[None], 2)[0] + x.abs().amax(1, keepdim=True)
    return y + F.hardtanh(net.bias - net.bias.detach() + 1).sum() + x.softmax(1)[:, :1].max()


def straight_through(net: nn.Module) -> Tensor:
    x = net(X)
    return x + (x.round() - x).detach()


def in_half_precision(net: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.gelu(net(X.float())).float()


def own_generator(net: nn.Module) -> Tensor:
    return net(X) + torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=X.dtype) * net.bias


@pytest.mark.parametrize("run", [at_kinks, straight_through, own_generator, in_half_precision])
def test_no_alarm_where_differences_mislead(run: Callable[[nn.Module], Tensor]) -> None:
    net = nn.Linear(6, 6).double()
    if run is in_half_precision:
        net = net.float()
    debug(net, lambda: run(net))


def mistaken(rule: Any, how: Callable[[Tensor], Tensor]) -> Any:
    """`rule` with a mistake in its map."""

    def changed(ctx: RuleContext, *args: Any, **kwargs: Any) -> Any:
        recorded = rule(ctx, *args, **kwargs)
        if recorded is NotImplemented:
            return NotImplemented
        result, tangent_map = recorded
        return result, lambda tangents: how(tangent_map(tangents))

    return changed


def one_row_off(t: Tensor) -> Tensor:
    t = t.clone()
    t[0] *= 1.01
    return t


MISTAKES = {"sign": torch.neg, "1 %": lambda t: t * 1.01, "one row": one_row_off, "dropped": torch.zeros_like}
NET = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mistake", list(MISTAKES))
@pytest.mark.parametrize(
    ("function", "place"),
    [(F.linear, "linear in Linear 0"), (F.gelu, "gelu in GELU 1"), (F.layer_norm, "layer_norm in LayerNorm 2"),
     (torch.tanh, "tanh in Tanh 3"), (F.dropout, "dropout in Dropout 4")],
)  # fmt: skip
def test_a_wrong_rule_is_named(
    function: Any, place: str, mistake: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rules.RULES, function, mistaken(rules.RULES[function], MISTAKES[mistake]))
    net, x = copy.deepcopy(NET).to(dtype), X.to(dtype)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match=rf"wrong derivative of {place}.*\[.*finite difference.*curveball_fused"):
        debug(net, lambda: net(x))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_transposed_rule_and_a_wrong_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def transposed(ctx: RuleContext, a: Tensor, b: Tensor) -> Any:
        at, b = ctx.tangent_index(a), ctx.save(b)
        return a @ b, lambda tangents: tangents[at] @ b.T  # type: ignore[operator]

    net, square_matrix = nn.Linear(6, 4).double(), X[:, :4].clone()
    with monkeypatch.context() as patch:
        patch.setitem(rules.RULES, torch.Tensor.matmul, transposed)
        with pytest.raises(RuntimeError, match=r"wrong derivative of matmul.*finite difference"):
            debug(net, lambda: net(X).matmul(square_matrix))

    def doubled(ctx: RuleContext, input: Tensor) -> Any:
        output, tangent_map = rules.activations.tanh(ctx, input)
        return 2 * output - output.detach(), tangent_map

    monkeypatch.setitem(rules.RULES, torch.tanh, doubled)
    with pytest.raises(RuntimeError, match=r"wrong derivative of tanh.*backward pass"):
        debug(net, lambda: torch.tanh(net(X)))


def test_a_wrong_dual_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = dual_rules.dual(mistaken(rules.RULES[F.softmax], MISTAKES["1 %"]))
    monkeypatch.setitem(dual_rules.RULES, F.softmax, rule)
    net = nn.Linear(6, 3).double()
    with pytest.raises(RuntimeError, match="wrong derivative of softmax"):
        debug(net, lambda: F.softmax(net(X), 1), "forward")


class Cube(torch.autograd.Function):
    """With a mistake in its forward-mode formula, 3 % in a float32 net."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad * ctx.saved_tensors[0] ** 2

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 3.1 * tangent * ctx.saved_tensors[0] ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_autograd_function_is_named(dtype: torch.dtype) -> None:
    net, x = nn.Linear(6, 3).to(dtype), X.to(dtype)
    with pytest.raises(RuntimeError, match=r"adjoint identity.*autograd functions Cube.*double_backward"):
        debug(net, lambda: Cube.apply(net(x)), "forward")


def test_what_torch_gets_wrong_is_refused_before() -> None:
    """torch 2.13's backward pass of as_strided_scatter keeps of x's gradient what was overwritten."""
    net = nn.Linear(6, 4).double()
    with pytest.raises(RuntimeError, match=r"as_strided_scatter: its tangent is not the transpose"):
        debug(net, lambda: torch.as_strided_scatter(net(X), X[0, :2], (2,), (1,)), "forward")


@pytest.mark.parametrize("method", [Linearized, DualNumbers])
def test_a_whole_product_that_is_wrong(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each call is right, and J and Jᵀ are wrong in the same way, only the model's own difference shows it."""
    jvp, vjp = method.jvp, method.vjp
    net, curvature = nn.Linear(6, 3).double(), "linearize" if method is Linearized else "forward"
    monkeypatch.setattr(method, "jvp", lambda self, v: (jvp(self, v)[0], 1.01 * jvp(self, v)[1]))
    with pytest.raises(RuntimeError, match=r"adjoint identity.*right by itself: linear"):
        debug(net, lambda: net(X).tanh(), curvature)
    monkeypatch.setattr(method, "vjp", lambda self, u: [1.01 * g for g in vjp(self, u)])
    with pytest.raises(RuntimeError, match="Ju, against a finite difference"):
        debug(net, lambda: net(X).tanh(), curvature)


@pytest.mark.parametrize("part", [0, 2])
def test_a_wrong_closed_form(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the gradient, and in the curvature."""
    monkeypatch.setattr(losses, "fused", lambda *_: None)
    form = losses.CLOSED_FORMS[F.mse_loss]

    def wrong(*args: Any, **kwargs: Any) -> Any:
        parts: list[Any] = list(form(*args, **kwargs))
        right = parts[part]
        parts[part] = right * 1.01 if isinstance(right, Tensor) else lambda v: right(v) * 1.01
        return tuple(parts)

    monkeypatch.setitem(losses.CLOSED_FORMS, F.mse_loss, wrong)
    net = nn.Linear(6, 3)
    with pytest.raises(RuntimeError, match=r"debug=True: (c = |Ju·HJu).*loss_fn"):
        debug(net, lambda: net(X.float()), loss=lambda out: F.mse_loss(out, torch.ones(4, 3)))


@pytest.mark.parametrize("curvature", AUTO)
def test_the_step_is_the_same_bit_for_bit(curvature: str) -> None:
    results = []
    for flag in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        optimizer = CurveBall(net.parameters(), curvature=curvature, lambda_interval=2, debug=flag)
        log = []
        for _ in range(3):
            log += optimizer.step(lambda net=net: net(X.float()), lambda out: F.dropout(out, 0.1).square().mean())
        z = [optimizer.state[p]["z"] for p in net.parameters()]
        stats = [t.nan_to_num() for t in optimizer.stats().values()]
        results.append([*log, *net.state_dict().values(), *z, *stats, torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("curvature", AUTO)
@pytest.mark.parametrize("options", [{}, dict(preconditioner="kronecker")])
@pytest.mark.parametrize("weight", [0.0, torch.tensor(0.0)])
def test_a_part_without_weight_may_be_no_number(
    weight: float | Tensor, options: dict[str, Any], curvature: str
) -> None:
    results = []
    for flag in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(6, 3)
        optimizer = CurveBall(net.parameters(), curvature=curvature, debug=flag, **options)
        parts: Any = [(lambda net=net: net(X.float()), square), (lambda net=net: net(X.float()) + math.nan, square)]
        losses = [optimizer.step(parts, weights=[1.0, weight])[0] for _ in range(3)]
        results.append([*losses, *net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and results[0][2] < results[0][0]


def test_dual_numbers_are_left_as_they_were() -> None:
    net = nn.Linear(6, 3).double()
    debug(net, lambda: net(X))
    assert not hasattr(net.weight, "tangent") and fwAD._current_level == -1


@pytest.mark.parametrize(
    ("function", "x"), [(F.dropout1d, torch.ones(5, 6)), (F.dropout3d, torch.ones(5, 2, 2, 2))], ids=["1d", "3d"]
)
def test_channels_dropped_without_a_batch(function: Any, x: Tensor) -> None:
    """Found by this check: the first dimension is that of the channels then."""
    scale = nn.Parameter(torch.ones(()))
    torch.manual_seed(0)
    optimizer = CurveBall([scale], debug=True)
    _, ours = optimizer.step(lambda: function(x * scale, 0.4), square)
    torch.manual_seed(0)
    assert torch.equal(ours, function(x, 0.4))


def test_an_empty_batch_norm() -> None:
    net = nn.BatchNorm1d(3).eval()
    optimizer = CurveBall(net.parameters(), debug=True)
    optimizer.step(lambda: torch.cat((net(torch.ones(0, 3) * net.bias), net(X[:, :3].float()))), square)


@pytest.mark.parametrize(
    ("wrong", "said"), [("basis", "orthogonality of a basis of parameter 0"), ("kernel", "P u = r for parameter 0")]
)
def test_a_wrong_metric_is_told(wrong: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(6, 3).double()
    optimizer = CurveBall(net.parameters(), preconditioner="kronecker", debug=True)
    for _ in range(2):
        optimizer.step(lambda: net(X), square)
    if wrong == "basis":
        optimizer.state[net.weight]["left_basis"][0, 0] += 1e-3
    else:
        right, name = ops.precondition_in_bases, "precondition_in_bases"
        monkeypatch.setattr(ops, name, lambda v, *args, **kw: right([2 * v_i for v_i in v], *args, **kw))
    before = net.weight.detach().clone()
    with pytest.raises(RuntimeError, match=said):
        optimizer.step(lambda: net(X), square)
    assert torch.equal(net.weight, before)
