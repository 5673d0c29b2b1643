"""Averaged coefficients, steps between solves, and the curvature of a part: harmless when they go wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from curveball_fused.backends.scalars import AVERAGE_BETA, AVERAGE_RHO, GATHERED, SOLVES
from curveball_fused.cuda_graphs.host_reads import NoHostReads
from tests.helpers.training import BACKENDS, SETTINGS, advance, assert_equal, everything, own_state, small

AVERAGES = [AVERAGE_BETA, AVERAGE_RHO, SOLVES, GATHERED]
OPTIONS: list[dict[str, Any]] = [
    dict(average=0.7),
    dict(direction="gradient", solve_interval=3),
    dict(preconditioner="kronecker"),
]


def loss_of(out: Tensor) -> Tensor:
    return F.cross_entropy(out, torch.arange(len(out)) % out.shape[1], label_smoothing=0.1)


def test_without_options_the_step_is_the_ordinary_one_bit_for_bit() -> None:
    runs = []
    for options in ({}, dict(average=0.0, solve_interval=1)):
        net, x, y = small()
        optimizer = CurveBall(net.parameters(), **SETTINGS, **options)
        advance(optimizer, net, x, y, 6)
        runs.append(everything(optimizer, net))
    assert_equal(*runs)


def test_momentum_is_bounded() -> None:
    """A loss so flat along z that the model wants ρ > 1; the predicted change is that of the bounded step."""
    rhos = []
    for average in (0.0, 1e-9):
        w = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
        optimizer = CurveBall([w], lambd=1e-3, auto_lambda=False, average=average)
        for scale in (1.0, 0.05):
            optimizer.step(lambda s=scale: w * s, lambda out: out.exp().sum() - 4 * out.sum())
        rhos.append(optimizer.stats()["rho"].item())
        assert optimizer.stats()["predicted_change"] < 0
    assert rhos[0] > 1.5 and rhos[1] == pytest.approx(1.0, abs=2e-9)


@pytest.mark.parametrize("steps", [0, 3, 12])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_checkpoint_resumes_bit_for_bit(options: dict[str, Any], steps: int) -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters(), **SETTINGS, **options)
    if steps:
        advance(optimizer, net, x, y, steps)
    twin, other = copy.deepcopy(net), None
    other = CurveBall(twin.parameters(), **SETTINGS, **options)
    saved = optimizer.state_dict()
    other.load_state_dict(saved)
    for o, model in ((optimizer, net), (other, twin)):
        torch.manual_seed(5)
        advance(o, model, x, y, 5)
    assert_equal(everything(optimizer, net), everything(other, twin))


def test_checkpoint_of_another_version_is_refused() -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters())
    advance(optimizer, net, x, y)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["scale"]
    with pytest.raises(ValueError, match="another version"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("bad", ["input", "loss"])
@pytest.mark.parametrize("bad_step", [0, 1, 11, 12])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_that_is_not_finite_costs_nothing(options: dict[str, Any], bad_step: int, bad: str) -> None:
    """Whether it is complete or not: weights, z, λ and the averages stay."""
    net, x, y = small()
    net[1].track_running_stats = False
    optimizer = CurveBall(net.parameters(), **SETTINGS, **options)
    advance(optimizer, net, x, y, bad_step) if bad_step else None
    before = [p.detach().clone() for p in net.parameters()]
    own = [t.clone() for t in own_state(optimizer, net)]
    kept = optimizer._shared["scalars"][AVERAGES].clone()
    factor = float("nan") if bad == "loss" else 1.0
    broken = x.clone()
    if bad == "input":
        broken[0, 0] = float("inf")
    optimizer.step(lambda: net(broken), lambda out: F.cross_entropy(out, y) * factor)
    assert optimizer.stats()["skipped_steps"] == 1
    assert_equal(before, list(net.parameters()))
    assert_equal(own, own_state(optimizer, net))
    assert_equal([kept], [optimizer._shared["scalars"][AVERAGES]])
    advance(optimizer, net, x, y, 6)
    assert all(p.isfinite().all() for p in net.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before[:1], net.parameters(), strict=False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_host_read(backend: str, options: dict[str, Any]) -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters(), backend=backend, lambda_interval=2, **options)
    loss = lambda out: F.cross_entropy(out, y[: len(out)])  # noqa: E731
    advance(optimizer, net, x, y)
    with NoHostReads(torch.device("cpu")):
        for _ in range(4):
            optimizer.step(lambda: net(x), loss)
            optimizer.step(lambda: net(x), loss, curvature_batch=(lambda: net(x[:4]), loss))


@pytest.mark.parametrize("options", [dict(), *OPTIONS], ids=str)
@pytest.mark.parametrize("partial", [False, True])
def test_statistics_and_generators_move_once(options: dict[str, Any], partial: bool) -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters(), lambda_interval=2, **options)
    loss = lambda out: F.cross_entropy(out, y[: len(out)])  # noqa: E731
    for step in range(5):
        twin = copy.deepcopy(net)
        torch.manual_seed(step)
        twin(x)
        drawn = torch.rand(3)
        torch.manual_seed(step)
        optimizer.step(lambda: net(x), loss, curvature_batch=(lambda: net(x[:4]), loss) if partial else None)
        assert torch.equal(drawn, torch.rand(3))
        assert_equal(list(twin.buffers()), list(net.buffers()))


def test_an_error_in_the_part_changes_nothing() -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters(), average=0.5, direction="gradient", solve_interval=2)
    advance(optimizer, net, x, y, 4)

    def fails() -> Tensor:
        net(x[:4])
        raise KeyError("no such thing")

    before = [t.clone() for t in everything(optimizer, net)]
    state = torch.get_rng_state()
    with pytest.raises(KeyError):
        optimizer.step(lambda: net(x), lambda out: F.cross_entropy(out, y), curvature_batch=(fails, loss_of))
    assert_equal(before, everything(optimizer, net))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.requires_grad for p in net.parameters())


def test_half_precision_parameters_keep_true_tangents() -> None:
    """A difference would drown in their rounding; bfloat16 and float32 go about the same way."""
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        net, x, y = small(dtype=dtype)
        del net[3]
        optimizer = CurveBall(net.parameters(), lambd=0.5, average=0.5, direction="gradient", solve_interval=3)
        advance(optimizer, net, x, y, 20)
        losses.append(optimizer.stats()["loss"].item())
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


def test_bad_options() -> None:
    net, x, _ = small()
    for options, error in (
        (dict(average=1.0), ValueError), (dict(average=-0.1), ValueError), (dict(average="much"), TypeError),
        (dict(solve_interval=0), ValueError), (dict(solve_interval=2.0), ValueError),
    ):  # fmt: skip
        with pytest.raises(error):
            CurveBall(net.parameters(), **options)
    optimizer = CurveBall(net.parameters())
    with pytest.raises(TypeError, match="two functions"):
        optimizer.step(lambda: net(x), loss_of, curvature_batch=lambda: net(x[:4]))  # type: ignore[arg-type]
    next(net.parameters()).register_hook(lambda g: 2 * g)
    with pytest.raises(RuntimeError, match="hooks"):
        optimizer.step(lambda: net(x), loss_of, curvature_batch=(lambda: net(x[:4]), loss_of))


def test_curvature_of_a_part_with_a_loss_of_some_outputs() -> None:
    """Picking outputs by an index saves it for the backward pass, which gradient and cotangent both make."""
    net, x, y = small()
    optimizer = CurveBall(net.parameters(), average=0.5)
    picked = torch.tensor([0, 2, 3])

    def loss_fn(out: Tensor) -> Tensor:
        return F.cross_entropy(out[picked], y[picked])

    losses = [
        float(optimizer.step(lambda: net(x), loss_fn, curvature_batch=(lambda: net(x[:4]), loss_fn))[0])
        for _ in range(20)
    ]
    assert losses[-1] < 0.5 * losses[0] and optimizer.stats()["skipped_steps"] == 0


@pytest.mark.parametrize(
    "options", [dict(average=0.8, solve_interval=4), dict(average=0.9, solve_interval=10)], ids=str
)
@pytest.mark.parametrize("preconditioner", [None, "kronecker"])
def test_a_convolutional_net_trains_with_few_solves(preconditioner: str | None, options: dict[str, Any]) -> None:
    """Its gradient in the Euclidean metric changes tenfold in these steps, and β is up to nine steps old."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(128, 4))
    patterns = torch.randn(4, 1, 8, 8)
    optimizer = CurveBall(net.parameters(), preconditioner=preconditioner, direction="gradient", **options)
    losses = []
    for _ in range(80):
        y = torch.randint(4, (64,))
        x = patterns[y] + torch.randn(64, 1, 8, 8)
        losses.append(float(optimizer.step(lambda x=x: net(x), lambda out, y=y: F.cross_entropy(out, y))[0]))
    assert max(losses[10:]) < losses[0] and max(losses[-10:]) < 0.15 * losses[0]


def test_a_safe_step_by_averages_expects_no_more_than_the_loss_has_to_give() -> None:
    """The loss is concave far from its minimum; what the gradient expects is measured along what the weights moved."""
    batch = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w = nn.Parameter(torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64))
    optimizer = CurveBall([w], average=0.9, auto_lambda=False)
    safe, shortened = 0.0, 0
    for step in range(14):
        scale, shift = (6.0, 2.5) if step >= 6 else (1.0, 0.0)
        run = lambda scale=scale, shift=shift: scale * batch @ w + shift  # noqa: E731
        loss_fn = lambda out: (1 - torch.exp(-out.square())).mean()  # noqa: E731
        before = w.detach().clone()
        (gradient,) = torch.autograd.grad(loss_fn(run()), w)
        optimizer.step(run, loss_fn)
        stats = optimizer.stats()
        if stats["safe_steps"] > safe:
            expected = -gradient @ (w.detach() - before)
            assert stats["predicted_change"] == pytest.approx(-0.5 * float(expected), rel=1e-9)
            shortened += int(stats["rho"] > 0)
        safe = float(stats["safe_steps"])
    assert shortened


@pytest.mark.parametrize("direction", ["residual", "gradient"])
def test_averages_of_other_weights_do_not_explode(direction: str) -> None:
    """Full batch and little damping: curvature grows a hundredfold in a few steps, and old β are far too long."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 6))
    y = torch.arange(240) % 6
    x = 0.5 * torch.randn(6, 16)[y] + 0.4 * torch.randn(240, 16)
    optimizer = CurveBall(net.parameters(), average=0.9, lambd=1e-3, direction=direction)
    losses = [float(optimizer.step(lambda: net(x), lambda out: F.cross_entropy(out, y))[0]) for _ in range(100)]
    assert max(losses) < 1.5 * losses[0] and losses[-1] < 0.05
