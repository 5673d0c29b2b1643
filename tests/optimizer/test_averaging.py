"""Averaged, rebuilt and partial systems: equal to dense matrices in float64, harmless when they go wrong."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from curveball_fused import CurveBall
from curveball_fused.cuda_graphs.host_reads import NoHostReads
from tests.helpers import nets
from tests.helpers.training import BACKENDS, SETTINGS, advance, assert_equal, everything, small

OPTIONS: list[dict[str, Any]] = [dict(average=0.7), dict(solve_interval=3), dict(average=0.6, solve_interval=2)]


def loss_of(out: Tensor) -> Tensor:
    return F.cross_entropy(out, torch.arange(len(out)) % out.shape[1], label_smoothing=0.1)


@dataclass
class Dense:
    """The options with J, H and A as matrices; z, w flat. ρ is at most 1."""

    net: nn.Module
    average: float
    solve_interval: int
    lambd: float
    lr: float
    matrices: list[Tensor] = field(default_factory=list)  # G and Gram in the basis (r, z), of past steps
    slopes: list[Tensor] = field(default_factory=list)
    betas: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.w = torch.cat([p.detach().flatten() for p in self.net.parameters()])
        self.z = torch.zeros_like(self.w)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        named = dict(self.net.named_parameters())
        parts = w.split([p.numel() for p in named.values()])
        values = {n: v.view(p.shape) for (n, p), v in zip(named.items(), parts, strict=True)}
        buffers = {n: b.clone() for n, b in self.net.named_buffers()}
        return functional_call(self.net, values | buffers, (x,))

    def model(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, J and the loss's Hessian in them."""
        out = self.forward(x, self.w)
        jacobian = torch.autograd.functional.jacobian(lambda w: self.forward(x, w).flatten(), self.w)
        hessian = torch.autograd.functional.hessian(lambda o: loss_of(o.view(out.shape)), out.detach().flatten())
        return out.detach(), jacobian, hessian

    def gradient(self, out: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(lambda o: loss_of(o.view(out.shape)), out.flatten())

    def step(self, x: Tensor, part: Tensor | None) -> None:
        out, jacobian, _ = self.model(x)
        gradient = jacobian.T @ self.gradient(out)
        out, jacobian, hessian = self.model(x if part is None else part)
        complete = len(self.betas) % self.solve_interval == 0
        jz = jacobian @ self.z
        if not complete:
            nearby = self.forward(x if part is None else part, self.w + 0.1 * self.z).detach()
            jz = (nearby - out).flatten() / 0.1
        r = gradient + jacobian.T @ hessian @ jz
        basis = torch.stack((r, self.z), dim=1)
        gram = basis.T @ basis
        tangents = torch.stack((jacobian @ r, jz), dim=1)
        curved = tangents.T @ hessian @ tangents
        if not complete:
            old = self.mean(self.matrices)
            rhr = old[0, 0, 0] / old[1, 0, 0] * gram[0, 0]
            sigma = old[0, 0, 1] / (old[0, 0, 0] * old[0, 1, 1]).sqrt() if old[0, 1, 1] > 0 else old[0, 1, 1]
            rhz = sigma * (rhr * curved[1, 1]).sqrt()
            curved = torch.stack((torch.stack((rhr, rhz)), torch.stack((rhz, curved[1, 1]))))
        slope = basis.T @ gradient
        if not complete:  # by adjointness, where the tangent is a difference
            slope = torch.stack((gram[0, 0] - curved[0, 1], gram[0, 1] - curved[1, 1]))
        self.matrices.append(torch.stack((curved, gram)))
        self.slopes.append(slope)
        (curved, gram), slope = self.mean(self.matrices), self.mean(self.slopes)

        to_delta = torch.tensor([[1.0, 0.0], [self.lambd, 1.0]], dtype=r.dtype)  # Δ = r + λ z
        a, b = to_delta.T @ (curved + self.lambd * gram) @ to_delta, to_delta.T @ slope
        if a[1, 1] == 0:
            beta, rho = b[0] / a[0, 0], b[0] * 0
        else:
            beta, rho = torch.linalg.solve(a, b) * torch.tensor([1.0, -1.0], dtype=r.dtype)
            if rho > 1:
                rho = torch.ones_like(rho)
                beta = (b[0] + a[0, 1]) / a[0, 0]
        self.betas.append((float(beta), float(rho)))
        self.z = rho * self.z - beta * (r + self.lambd * self.z)
        self.w = self.w + self.lr * self.z

    def mean(self, values: list[Tensor]) -> Tensor:
        weights = [self.average**i for i in range(len(values))][::-1]
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)  # type: ignore[return-value]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("options", [*OPTIONS, dict(average=1e-12)], ids=str)
@pytest.mark.parametrize("name, curvature", [("attention", "auto"), ("convolution + batch norm", "linearize")])
def test_equals_dense_matrices(name: str, curvature: str, options: dict[str, Any], partial: bool, backend: str) -> None:
    net, x = nets.make(name)
    options = dict(average=0.0, solve_interval=1) | options
    dense = Dense(copy.deepcopy(net), lambd=0.6, lr=0.8, **options)
    optimizer = CurveBall(
        net.parameters(), lr=0.8, lambd=0.6, auto_lambda=False, curvature=curvature, backend=backend, **options
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        batch = x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        part = batch[:4] if partial else None
        curvature_batch = (lambda part=part: net(part), loss_of) if partial else None
        loss, outputs = optimizer.step(lambda: net(batch), loss_of, curvature_batch=curvature_batch)
        torch.testing.assert_close(outputs, dense.forward(batch, dense.w).detach(), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(loss, loss_of(outputs))
        dense.step(batch, part)
        beta, rho = dense.betas[-1]
        assert optimizer.stats()["beta"].item() == pytest.approx(beta, rel=1e-7)
        assert optimizer.stats()["rho"].item() == pytest.approx(rho, rel=1e-7, abs=1e-9)
    assert optimizer.stats()["skipped_steps"] == 0


def test_without_options_the_step_is_the_ordinary_one_bit_for_bit() -> None:
    runs = []
    for options in ({}, dict(average=0.0, solve_interval=1)):
        net, x, y = small()
        optimizer = CurveBall(net.parameters(), **SETTINGS, **options)
        advance(optimizer, net, x, y, 6)
        runs.append(everything(optimizer, net))
        assert not optimizer._shared["system"].any()
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
    assert rhos[0] > 1.5 and rhos[1] == 1.0


@pytest.mark.parametrize("steps", [0, 3, 4])
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
    del saved["state"][0]["system"]
    with pytest.raises(ValueError, match="another version"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("bad", ["input", "loss"])
@pytest.mark.parametrize("bad_step", range(4))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_that_is_not_finite_costs_nothing(options: dict[str, Any], bad_step: int, bad: str) -> None:
    """Whether it is complete or not: weights, z, λ and the averages stay."""
    net, x, y = small()
    net[1].track_running_stats = False
    optimizer = CurveBall(net.parameters(), **SETTINGS, **options)
    advance(optimizer, net, x, y, bad_step) if bad_step else None
    before = [p.detach().clone() for p in net.parameters()]
    system = optimizer._shared["system"].clone() if bad_step else torch.zeros(9, dtype=torch.float64)
    factor = float("nan") if bad == "loss" else 1.0
    broken = x.clone()
    if bad == "input":
        broken[0, 0] = float("inf")
    optimizer.step(lambda: net(broken), lambda out: F.cross_entropy(out, y) * factor)
    assert optimizer.stats()["skipped_steps"] == 1
    assert_equal(before, list(net.parameters()))
    assert_equal([system], [optimizer._shared["system"]])
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
    optimizer = CurveBall(net.parameters(), average=0.5, solve_interval=2)
    advance(optimizer, net, x, y, 3)

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
        optimizer = CurveBall(net.parameters(), lambd=0.5, average=0.5, solve_interval=3)
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
