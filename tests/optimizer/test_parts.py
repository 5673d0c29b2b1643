"""A batch in parts: the step is that of the whole, in the memory of one part."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from tests.helpers import nets
from tests.helpers.oracle import DenseCurveBall
from tests.helpers.replicas import Square
from tests.helpers.training import assert_equal, everything

OPTIONS: dict[str, dict[str, Any]] = {
    "published": dict(lr=0.8, lambd=0.6, weight_decay=0.02, lambda_interval=2, lambda_factor=0.9),
    "fixed": dict(lambd=2.0, beta=0.3, rho=0.7, auto_lambda=False),
    "gradient": dict(lambd=0.5, direction="gradient", solve_interval=3, average=0.4, lambda_interval=1),
    "metric": dict(preconditioner="kronecker", lambd=20.0, solve_interval=3, lambda_interval=1, weight_decay=1e-3),
    "metric, residual": dict(preconditioner="kronecker", direction="residual", lambd=20.0, lr=0.9),
}
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y)


def fourth_power(out: Tensor, y: Tensor) -> Tensor:
    return (out - F.one_hot(y, out.shape[1])).pow(4).mean()


def with_batch_norm_and_dropout(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
    return net.to(dtype)


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(11, 5, dtype=torch.float64, generator=generator).to(dtype), torch.randint(
        3, (11,), generator=generator
    )


def parts_of(net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, cuts: list[int], loss: Loss) -> list[Any]:
    return [
        (lambda x_i=x_i: net(x_i), lambda out, y_i=y_i: loss(out, y_i))
        for x_i, y_i in zip(x.split(cuts), y.split(cuts))
    ]


def as_one(net: nn.Module, x: Tensor, y: Tensor, cuts: list[int], loss: Loss) -> tuple[Any, Any]:
    """The same function as one model and one loss: the parts run one after the other."""
    parts = parts_of(net, x, y, cuts, loss)

    def loss_fn(out: Tensor) -> Tensor:
        losses = [f(o) * len(o) for (_, f), o in zip(parts, out.split(cuts))]
        return torch.stack(losses).sum() / len(out)

    return lambda: torch.cat([f() for f, _ in parts]), loss_fn


@pytest.mark.parametrize("curvature", ["auto", "linearize_operators", "forward", "double_backward"])
@pytest.mark.parametrize("name", ["attention", "tied weights"])
def test_twenty_steps_are_those_of_dense_matrices_of_the_whole(name: str, curvature: str) -> None:
    net, x = nets.make(name)
    reference, parameters = copy.deepcopy(net), dict(net.named_parameters())
    y = torch.randint(3, (net(x)[..., 0].numel(),))
    optimizer = CurveBall(net.parameters(), curvature=curvature, **OPTIONS["published"])
    oracle = DenseCurveBall(reference, [list(parameters)], [0.8], [0.02], 0.6, 0.5, 1.5, 0.9, 2)
    rows = y.view(len(x), -1)

    def loss_of(out: Tensor, y_i: Tensor) -> Tensor:
        return F.cross_entropy(out.reshape(-1, out.shape[-1]), y_i.reshape(-1))

    cuts = [1, 3, len(x) - 4]
    for _ in range(20):
        loss, outputs = optimizer.step(parts_of(net, x, rows, cuts, loss_of))
        expected, _ = oracle.step(lambda net: net(x), lambda out: loss_of(out, rows))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
        for key, value in oracle.log[-1].items():
            assert optimizer.stats()[key].item() == pytest.approx(value, rel=1e-8, abs=1e-10)
        assert [len(out) for out in outputs] == cuts
    for p, q in zip(net.parameters(), reference.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", [cross_entropy, fourth_power])
@pytest.mark.parametrize("curvature", ["auto", "linearize_operators", "forward", "double_backward"])
@pytest.mark.parametrize("options", OPTIONS)
def test_parts_run_one_after_the_other_as_one_function_would(options: str, curvature: str, loss: Loss) -> None:
    """Statistics of batches, masks of dropout and generators included; in each look at λ, too."""
    found = []
    for split in (True, False):
        net = with_batch_norm_and_dropout()
        optimizer = CurveBall(net.parameters(), curvature=curvature, **OPTIONS[options])
        torch.manual_seed(5)
        losses = []
        for step in range(10):
            x, y = batch(step)
            given = (parts_of if split else as_one)(net, x, y, [4, 2, 5], loss)
            losses.append(optimizer.step(given)[0] if split else optimizer.step(*given)[0])
        found.append([*net.state_dict().values(), *losses, optimizer.stats()["lambd"], torch.rand(())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("curvature", ["auto", "forward"])
def test_buffers_that_a_later_part_alone_moves_are_put_back(curvature: str) -> None:
    """The first part reads what the second writes: in its second run, too, it reads what was there before."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(1, dtype=torch.float64))
            self.layer = nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 6:
                self.scale.mul_(1.5)
            return self.layer(x) * self.scale.clone()

    found = []
    for split in (True, False):
        torch.manual_seed(0)
        net = Reads()
        optimizer = CurveBall(net.parameters(), curvature=curvature, lambd=0.5)
        for step in range(4):
            given = (parts_of if split else as_one)(net, *batch(step), [5, 6], fourth_power)
            optimizer.step(given) if split else optimizer.step(*given)
        found.append(torch.cat([t.flatten() for t in net.state_dict().values()]))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS)
def test_one_part_is_an_ordinary_step_bit_for_bit(options: str) -> None:
    found = []
    for listed in (True, False):
        net = with_batch_norm_and_dropout(torch.float32)
        optimizer = CurveBall(net.parameters(), **OPTIONS[options])
        torch.manual_seed(5)
        for step in range(6):
            x, y = batch(step, torch.float32)
            part = (lambda: net(x), lambda out: F.cross_entropy(out, y))
            optimizer.step([part], weights=[3.0]) if listed else optimizer.step(*part)
        found.append(everything(optimizer, net))
    assert_equal(*found)


@pytest.mark.parametrize("kind", ["numbers", "tensors", "samples"])
@pytest.mark.parametrize("options", ["published", "metric"])
def test_weights(options: str, kind: str) -> None:
    """Those of tokens, say, of which only some count: the mean over the whole is not the mean of the means."""
    found = []
    for split in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        optimizer = CurveBall(net.parameters(), **OPTIONS[options])
        for step in range(6):
            x, y = batch(step)
            if kind != "samples":
                y[4:7] = -100
            parts = parts_of(net, x, y, [5, 6], cross_entropy)
            counts = [(part != -100).sum() for part in y.split([5, 6])]
            weights = {"numbers": list(map(int, counts)), "tensors": counts, "samples": None}[kind]
            if split:
                optimizer.step(parts, weights=weights)
            else:
                optimizer.step(lambda: net(x), lambda out: F.cross_entropy(out, y))
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)


KINDS_OF_WEIGHTS: dict[str, list[Any]] = {
    "bool": [torch.tensor(True), torch.tensor(True)],
    "uint8": [torch.tensor(200, dtype=torch.uint8)] * 2,
    "int64": [torch.tensor(3), torch.tensor(7)],
    "bfloat16": [torch.tensor(300, dtype=torch.bfloat16), torch.tensor(600, dtype=torch.bfloat16)],
    "one element": [torch.ones(1), torch.ones(1)],
    "requires grad": [torch.tensor(1.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)],
    "numpy": [np.int64(1), np.float32(3.0)],
    "mixed": [torch.tensor(1), 3],
}


@pytest.mark.parametrize("kind", KINDS_OF_WEIGHTS)
@pytest.mark.parametrize("options", ["published", "metric"])
def test_weights_of_any_kind_add_up(options: str, kind: str) -> None:
    found = []
    for given in (KINDS_OF_WEIGHTS[kind], list(map(float, KINDS_OF_WEIGHTS[kind]))):
        torch.manual_seed(0)
        net = nn.Linear(5, 3).double()
        optimizer = CurveBall(net.parameters(), **OPTIONS[options])
        for step in range(3):
            loss, _ = optimizer.step(parts_of(net, *batch(step), [5, 6], cross_entropy), weights=given)
        assert not loss.requires_grad
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)  # 3 / 10 rounds in two ways, and the metric divides by it


@pytest.mark.parametrize("kind", ["numbers", "tensors", "samples"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_part_of_which_nothing_counts_is_no_bad_batch(options: str, kind: str) -> None:
    """Its loss is the mean of nothing, NaN; where all parts are such, so is that of the whole."""
    found = []
    for split in (True, False):
        torch.manual_seed(0)
        net = nn.Linear(5, 3).double()
        optimizer = CurveBall(net.parameters(), **OPTIONS[options])
        for step in range(6):
            x, y = batch(step)
            cuts = [11, 0] if kind == "samples" else [4, 7]
            if kind != "samples":
                y[4:] = -100
            weights = {"numbers": [4, 0], "tensors": [torch.tensor(4), torch.tensor(0)], "samples": None}[kind]
            if split:
                loss, _ = optimizer.step(parts_of(net, x, y, cuts, cross_entropy), weights=weights)
                assert torch.isfinite(loss)
            else:
                optimizer.step(lambda: net(x), lambda out: F.cross_entropy(out, y))
        assert optimizer.stats()["skipped_steps"] == 0
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        before = net.weight.clone()
        if split:
            optimizer.step(parts_of(net, *batch(0), [0, 11], cross_entropy)[:1] * 2)
            assert optimizer.stats()["skipped_steps"] == 1 and torch.equal(net.weight, before)
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)


def test_a_part_of_no_weight_changes_nothing() -> None:
    found = []
    for extra in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(5, 3).double()
        optimizer = CurveBall(net.parameters(), lambd=0.5)
        for step in range(4):
            x, y = batch(step)
            parts = parts_of(net, x, y, [11], cross_entropy)
            more = parts_of(net, *batch(step + 50), [11], cross_entropy) if extra else []
            optimizer.step(parts + more, weights=[11] + [0] * len(more))
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_closures_and_structures_of_outputs(by_keyword: bool) -> None:
    net, x, y = nn.Linear(5, 3).double(), *batch(0)
    other = copy.deepcopy(net)
    whole = CurveBall(other.parameters(), lambd=0.5).step(lambda: other(x), lambda out: F.cross_entropy(out, y))
    closures = [
        lambda x_i=x_i, y_i=y_i: ({"logits": net(x_i), "n": len(x_i)}, lambda o: F.cross_entropy(o["logits"], y_i))
        for x_i, y_i in zip(x.split(4), y.split(4))
    ]
    optimizer = CurveBall(net.parameters(), lambd=0.5)
    loss, outputs = optimizer.step(closure=closures) if by_keyword else optimizer.step(closures)
    torch.testing.assert_close(loss, whole[0])
    assert [out["n"] for out in outputs] == [4, 4, 3]
    torch.testing.assert_close(torch.cat([out["logits"] for out in outputs]), whole[1])
    torch.testing.assert_close(net.weight, other.weight)


@pytest.mark.parametrize("structure", ["tensor", "dictionary"])
@pytest.mark.parametrize("curvature", ["auto", "linearize_operators", "forward", "double_backward"])
@pytest.mark.parametrize("options", ["published", "metric"])
def test_the_memory_is_that_of_one_part(options: str, curvature: str, structure: str) -> None:
    """When a part runs, what the parts before it have computed is gone."""
    alive: list[weakref.ref[Tensor]] = []

    class Watched(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            alive.append(weakref.ref(h.untyped_storage()))
            return h * 1.0

    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), Watched(), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = CurveBall(net.parameters(), curvature=curvature, **OPTIONS[options])
    seen = []

    def model_of(x_i: Tensor) -> Callable[[], Any]:
        def model_fn() -> Any:
            seen.append(sum(ref() is not None for ref in alive))
            alive.clear()
            out = net(x_i)
            return {"out": out, "twice": 2 * out} if structure == "dictionary" else out

        return model_fn

    for step in range(5):
        x, y = batch(step)
        optimizer.step(
            [
                (model_of(x_i), lambda o, y_i=y_i: F.cross_entropy(o if isinstance(o, Tensor) else o["twice"], y_i))
                for x_i, y_i in zip(x.split(3), y.split(3))
            ]
        )
    assert len(seen) > 20 and not any(seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", ["published", "metric"])
def test_half_precision(options: str, dtype: torch.dtype) -> None:
    found = []
    for cuts in ([11], [4, 7]):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = CurveBall(net.parameters(), **OPTIONS[options])
        for step in range(8):
            x, y = batch(step % 2, torch.float32)
            with torch.autocast("cpu", dtype):
                loss, _ = optimizer.step(parts_of(net, x, y, cuts, cross_entropy))
        assert not optimizer.stats()["skipped_steps"]
        found.append(float(loss))
    assert found[0] == pytest.approx(found[1], rel=0.01)


def test_a_curvature_batch_beside_parts() -> None:
    found = []
    for cuts in ([11], [4, 7]):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        optimizer = CurveBall(net.parameters(), lambd=0.4)
        for step in range(6):
            x, y = batch(step)
            part = (lambda: net(x[:5]), lambda out: F.cross_entropy(out, y[:5]))
            optimizer.step(parts_of(net, x, y, cuts, cross_entropy), curvature_batch=part)
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("options", ["published", "metric"])
def test_debug_looks_at_each_part_and_changes_no_step(options: str) -> None:
    found = []
    for debug in (False, True):
        net = with_batch_norm_and_dropout()
        optimizer = CurveBall(net.parameters(), debug=debug, **OPTIONS[options])
        torch.manual_seed(5)
        for step in range(4):
            optimizer.step(parts_of(net, *batch(step), [4, 7], cross_entropy))
        found.append(everything(optimizer, net))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class Lying(torch.autograd.Function):
    """Twice the identity, by its backward pass the identity; its tangent agrees with neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * g.detach().abs()

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return 2 * t


@pytest.mark.parametrize("which", [0, 1])
def test_a_wrong_derivative_in_one_part_is_refused(which: int) -> None:
    net, x, y = nn.Linear(5, 3).double(), *batch(0)
    before = copy.deepcopy(net.state_dict())
    parts = parts_of(net, x, y, [5, 6], cross_entropy)
    honest = parts[which][0]
    parts[which] = (lambda: Lying.apply(honest()), parts[which][1])
    optimizer = CurveBall(net.parameters(), lambd=0.5)
    with pytest.raises(RuntimeError, match=r"not each other's transpose.* the autograd functions Lying"):
        optimizer.step(parts)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("options", ["published", "metric"])
@pytest.mark.parametrize("where", ["model", "loss"])
def test_an_error_in_a_later_part_changes_nothing(where: str, options: str) -> None:
    net = with_batch_norm_and_dropout()
    optimizer = CurveBall(net.parameters(), **OPTIONS[options])
    for step in range(2):
        optimizer.step(parts_of(net, *batch(step), [4, 7], cross_entropy))
    torch.manual_seed(9)
    before = [t.clone() for t in everything(optimizer, net)]
    state = torch.get_rng_state()
    parts = parts_of(net, *batch(7), [4, 7], cross_entropy)

    def fail(*_: Any) -> Any:
        raise ValueError("no such sample")

    parts[1] = (fail, parts[1][1]) if where == "model" else (parts[1][0], fail)
    optimizer.param_groups[0]["solve_interval"] = 1
    with pytest.raises(ValueError, match="no such sample"):
        optimizer.step(parts)
    assert_equal(before, everything(optimizer, net))
    assert torch.equal(state, torch.get_rng_state())


def test_a_method_that_cannot_follow_one_part_follows_none(recwarn: pytest.WarningsRecorder) -> None:
    found = []
    for split in (True, False):
        torch.manual_seed(2)
        net = nn.Linear(5, 3).double()
        optimizer = CurveBall(net.parameters(), lambd=0.5)
        for step in range(4):
            x, y = batch(step)
            parts = parts_of(net, x, y, [5, 6], cross_entropy)
            second = parts[1][0]
            squared = lambda second=second: Square.apply(second())  # noqa: E731
            if split:
                optimizer.step([parts[0], (squared, parts[1][1])])
            else:
                one = lambda parts=parts, squared=squared: torch.cat((parts[0][0](), squared()))  # noqa: E731
                optimizer.step(one, lambda out: F.cross_entropy(out, y))
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("weight", [-1.0, -math.inf, math.nan, math.inf, -3])
def test_a_tensor_that_is_no_weight_skips_the_step(weight: float, options: str) -> None:
    net = nn.Linear(5, 3).double()
    optimizer = CurveBall(net.parameters(), **OPTIONS[options])
    for step in range(8):
        optimizer.step(parts_of(net, *batch(step), [4, 7], cross_entropy))
    before = [t.clone() for t in weights_and_z(net, optimizer)]
    lambd = optimizer.stats()["lambd"]
    for step in range(5):
        weights = [torch.tensor(4.0), torch.tensor(weight)]
        loss, _ = optimizer.step(parts_of(net, *batch(step), [4, 7], cross_entropy), weights=weights)
        assert loss.isnan()
    assert_equal(before, weights_and_z(net, optimizer))
    assert optimizer.stats()["skipped_steps"] == 5 and optimizer.stats()["lambd"] == lambd


def weights_and_z(net: nn.Module, optimizer: CurveBall) -> list[Tensor]:
    return [t for p in net.parameters() for t in (p.detach(), optimizer.state[p]["z"])]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_loss", [torch.float16, torch.float32, torch.float64])
def test_the_loss_of_parts_has_the_dtype_of_one(of_loss: torch.dtype, dtype: torch.dtype, options: str) -> None:
    for fraction in (False, True):  # a curvature batch too
        found = []
        for split in (True, False):
            torch.manual_seed(0)
            net = nn.Linear(5, 3).to(dtype)
            optimizer = CurveBall(net.parameters(), **OPTIONS[options])
            loss = lambda out, y: F.cross_entropy(out, y).to(of_loss)  # noqa: E731
            for step in range(4):
                (given,) = parts_of(net, *batch(step, dtype), [11], loss)
                more: dict[str, Any] = dict(curvature_batch=given) if fraction else {}
                parts = parts_of(net, *batch(step, dtype), [4, 7], loss)
                found.append(optimizer.step(parts, **more)[0] if split else optimizer.step(*given, **more)[0])
        assert {each.dtype for each in found} == {of_loss}
        torch.testing.assert_close(found[:4], found[4:], rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (dict(model_fn=[]), ValueError, "the list of parts is empty"),
        (
            dict(model_fn=(len, len)),
            TypeError,
            r"write step\(model_fn, loss_fn\), or step\(\[\(model_fn, loss_fn\)\]\)",
        ),
        (dict(model_fn=[1]), TypeError, r"each part of a batch must be \(model_fn, loss_fn\)"),
        (dict(model_fn=[(len,)]), TypeError, "each part of a batch must be"),
        (dict(model_fn=[(len, len)], weights=[1, 2]), ValueError, "weights must be a list of 1 numbers"),
        (dict(model_fn=[(len, len)], weights=[-1]), ValueError, "at least 0; got -1"),
        (dict(model_fn=[(len, len)], weights=[float("nan")]), ValueError, "at least 0; got nan"),
        (dict(model_fn=[(len, len)], weights=[torch.ones(2)]), ValueError, "0-dim"),
        (dict(model_fn=[(len, len), (len, len)], weights=[0, 0]), ValueError, "all weights are zero"),
        (dict(model_fn=zip([len], [len])), TypeError, r"must be a list.*list\(parts\)"),
        (dict(closure=(pair for pair in [(len, len)])), TypeError, r"must be a list.*list\(parts\)"),
        (dict(model_fn=len, loss_fn=len, weights=[1]), TypeError, "weights belong to a list of parts"),
        (dict(model_fn=[(len, len)], loss_fn=len), TypeError, "CurveBall.step differentiates the model itself"),
        (dict(model_fn=lambda out: out, loss_fn=lambda y=1: torch.ones(2)), TypeError, "needs 1.*The model's .* first"),
        (dict(model_fn=[(lambda out: out, lambda: torch.ones(2))]), TypeError, "model_fn is called without arguments"),
        (dict(model_fn=nn.Linear(2, 2), loss_fn=len), TypeError, r"Linear.forward needs 1: write .*lambda: model\(x\)"),
        (dict(model_fn=nn.Linear(2, 2).forward, loss_fn=len), TypeError, "Linear.forward needs 1"),
    ],
)
def test_wrong_calls_say_what_to_write(call: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        CurveBall(nn.Linear(2, 2).parameters()).step(**call)
