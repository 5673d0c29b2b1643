"""Losses without curvature in the outputs: they descend, by a matrix that stands for theirs, and a warning says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from curveball_fused.cuda_graphs.host_reads import NoHostReads
from curveball_fused.losses import LossModel, stretch, substituted
from tests.helpers.oracle import DenseCurveBall
from tests.helpers.training import BACKENDS, assert_equal

METHODS = ["linearize", "forward", "double_backward"]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(64, 6, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(0, 3, (64,), generator=GENERATOR)
TARGET = 2 * torch.randn(64, 3, generator=GENERATOR, dtype=torch.float64)
SIGNS = 2.0 * F.one_hot(Y, 3).double() - 1


def net_of(last: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3), last or nn.Identity()).to(dtype)


def cross_entropy(out: Tensor) -> Tensor:
    return F.cross_entropy(out, Y)


def margins(out: Tensor) -> Tensor:
    return 1 + out - out.gather(1, Y[:, None])


Model, Loss = Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]
# What the model makes of the last layer's values, and the loss of that.
LINEAR: dict[str, tuple[Model, Loss]] = {
    "a part of nll_loss": (lambda o: o.log_softmax(1), lambda o: 2 * F.nll_loss(o, Y, reduction="none").mean()),
    "log of a softmax": (lambda o: o.softmax(1).log(), lambda o: -o.gather(1, Y[:, None]).mean()),
    "kl_div": (lambda o: o.log_softmax(1), lambda o: F.kl_div(o, TARGET.softmax(1), reduction="batchmean")),
    "logsigmoid": (lambda o: F.logsigmoid(SIGNS * o), lambda o: -o.mean()),
    "the loss in the model": (cross_entropy, lambda loss: loss),
    "the loss in the model, summed": (lambda o: F.cross_entropy(o, Y, reduction="sum"), lambda loss: loss),
    "squares in the model": (lambda o: F.mse_loss(o, TARGET), lambda loss: loss),
    "losses of samples": (lambda o: F.cross_entropy(o, Y, reduction="none"), torch.mean),
    "losses of samples, summed": (lambda o: F.cross_entropy(o, Y, reduction="none"), torch.sum),
    "value of a critic": (lambda o: o.tanh(), lambda q: -q.mean()),
    "difference of a critic": (lambda o: o.tanh(), lambda q: q[:32].mean() - q[32:].mean()),
    "pinball": (lambda o: o, lambda o: torch.maximum(0.9 * (TARGET - o), 0.1 * (o - TARGET)).mean()),
    "multi margin": (lambda o: o, lambda o: margins(o).clamp(min=0).mean()),
    "margin ranking": (lambda o: o, lambda o: F.margin_ranking_loss(o[:, 0], o[:, 1], SIGNS[:, 0], margin=0.5)),
}
PIECEWISE: dict[str, tuple[Model, Loss]] = {
    "absolute": (lambda o: o, lambda o: F.l1_loss(o, TARGET)),
    "hinge": (lambda o: o, lambda o: F.relu(1 - SIGNS * o).mean()),
    "leaky": (lambda o: o, lambda o: F.leaky_relu(1 - SIGNS * o, 0.1).mean()),
    "city block": (lambda o: o, lambda o: torch.linalg.vector_norm(o - TARGET, 1, dim=1).mean()),
}
EVERY = LINEAR | PIECEWISE


@pytest.mark.parametrize("scale", [1, 10])
@pytest.mark.parametrize("name", EVERY)
def test_descends(name: str, scale: float) -> None:
    """On inputs of size 10, gradient descent at the rate 1 makes the most of them explode."""
    head, loss_fn = EVERY[name]
    net = net_of()
    optimizer = CurveBall(net.parameters())
    with pytest.warns(UserWarning, match="no curvature"):
        losses = [float(optimizer.step(lambda: head(net(scale * X)), loss_fn)[0]) for _ in range(40)]
    assert losses[-1] < losses[0] and losses[30] < losses[0]
    assert max(losses) < 3 * losses[0] if losses[0] > 0.1 else max(losses) < 0.1
    assert optimizer.stats()["skipped_steps"] == optimizer.stats()["safe_steps"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("curvature", METHODS)
@pytest.mark.parametrize("name", ["a part of nll_loss", "losses of samples", "multi margin", "absolute", "hinge"])
def test_the_matrix_in_its_place(name: str, curvature: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """H = g gᵀ / Σ |g_i o_i|, against dense matrices."""
    head, loss_fn = EVERY[name]

    def hessian(objective: Loss, outputs: Tensor) -> Tensor:
        g = torch.autograd.functional.jacobian(objective, outputs)
        return torch.outer(g, g) / (g * outputs).abs().sum()

    monkeypatch.setattr(torch.autograd.functional, "hessian", hessian)
    net, reference = net_of(), net_of()
    options: dict[str, Any] = dict(lambd=0.7, lambda_low=0.9, lambda_high=1.1, lambda_factor=0.97, lambda_interval=3)
    optimizer = CurveBall(
        net.parameters(), 0.8, weight_decay=0.03, curvature=curvature, backend=backend, maximize=True, **options
    )
    names = [name for name, _ in reference.named_parameters()]
    oracle = DenseCurveBall(reference, [names], [0.8], [0.03], 0.7, 0.9, 1.1, 0.97, 3, maximize=True)
    for _ in range(5):
        loss, _ = optimizer.step(lambda: head(net(X)), lambda out: -loss_fn(out))
        expected, _ = oracle.step(lambda net: head(net(X)), lambda out: -loss_fn(out))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
        for key, value in oracle.log[-1].items():
            assert optimizer.stats()[key].item() == pytest.approx(value, rel=1e-7, abs=1e-10), key


def cotangent(loss_fn: Loss, outputs: Tensor, v: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What a step makes of a loss that is the whole one."""
    model = LossModel(loss_fn, outputs, 1.0, [])
    c, products = model.cotangent(v)
    along_z = model.along_z(v, products)
    return c * stretch(along_z).to(c.dtype), lambda u: substituted(products(u), along_z)[0]


@pytest.mark.parametrize("outputs", [torch.zeros(4), torch.zeros(0), torch.zeros(())])
def test_of_size_zero_it_is_zero(outputs: Tensor) -> None:
    v = torch.ones_like(outputs)
    c, products = cotangent(lambda o: 2 * o.sum(), outputs, v)
    torch.testing.assert_close(c, 2 * v)
    gv = 2.0 * v.numel()
    assert products(v).tolist() == [gv, 0, gv, 0, 0]


def test_a_curvature_that_is_there_is_kept_bit_for_bit() -> None:
    """Also where it is zero along one of the two tangents."""
    outputs = torch.randn(8)
    for v in (torch.zeros(8), torch.randn(8), torch.eye(8)[0]):
        for u in (torch.randn(8), torch.eye(8)[0], torch.eye(8)[1]):
            c, products = cotangent(lambda o: o[1:].exp().sum() - o[0], outputs, v)
            h = outputs.exp() * (torch.arange(8) > 0)
            g = h - (torch.arange(8) == 0).float()
            if (h * v).any() or (not v.any() and (h * u).any()):
                assert torch.equal(c, h * v + g)
                expected = [
                    (a * b).sum(dtype=torch.float64) for a, b in ((g, v), (h * v, v), (g, u), (h * v, u), (h * u, u))
                ]
                assert torch.equal(products(u), torch.stack(expected))
            else:  # one matrix for all products of a step, so that they stay consistent
                c_of, products_of = c - g, products(u)
                torch.testing.assert_close(products_of[1], (c_of * v).sum(dtype=torch.float64))
                torch.testing.assert_close(products_of[3], (c_of * u).sum(dtype=torch.float64))


@pytest.mark.parametrize("loss_fn", [lambda o: F.mse_loss(o, 100 + o.detach()), lambda o: (o - 100).square().sum()])
def test_a_curvature_that_rounding_hides_beside_the_gradient_is_there(loss_fn: Loss) -> None:
    outputs = torch.randn(5, 3)
    for size, there in ((1e-12, True), (0.0, False)):
        model = LossModel(loss_fn, outputs, 1.0, [])
        v = size * torch.randn(5, 3)
        c, products = model.cotangent(v)
        assert torch.equal(c, model.gradient())
        assert bool(model.along_z(v, products)[2] > 0) == bool(model.along_z(v, products)[3] > 0) == there


def warned(model_fn: Callable[[], Tensor], loss_fn: Loss, net: nn.Module, steps: int = 3, **options: Any) -> list[str]:
    optimizer = CurveBall(net.parameters(), **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.step(model_fn, loss_fn)
    return [str(w.message) for w in told if "no curvature" in str(w.message)]


@pytest.mark.parametrize("name", EVERY)
def test_is_told_once(name: str) -> None:
    head, loss_fn = EVERY[name]
    net = net_of()
    (message,) = warned(lambda: head(net(X)), loss_fn, net)
    assert "F.cross_entropy" in message and "smooth" in message


@pytest.mark.parametrize(
    ("last", "loss_fn"),
    [
        (None, cross_entropy),
        (None, lambda o: F.huber_loss(o, TARGET)),
        (None, lambda o: F.mse_loss(o, TARGET)),
        (None, lambda o: o.square().mean()),
        (None, lambda o: F.nll_loss(o.log_softmax(1), Y)),
        (nn.LogSoftmax(1), lambda o: F.nll_loss(o, Y)),
        (nn.Softmax(1), lambda o: F.nll_loss(o.log(), Y)),
    ],
)
def test_is_not_told_of_losses_with_curvature(last: nn.Module | None, loss_fn: Loss) -> None:
    net = net_of(last)
    assert not warned(lambda: net(X), loss_fn, net)


@pytest.mark.parametrize("name", EVERY)
def test_reads_nothing_on_the_host_after_the_first_step(name: str) -> None:
    head, loss_fn = EVERY[name]
    net = net_of()
    optimizer = CurveBall(net.parameters(), lambda_interval=2)
    optimizer.step(lambda: head(net(X)), loss_fn)
    with NoHostReads(torch.device("cpu")):
        for _ in range(3):
            optimizer.step(lambda: head(net(X)), loss_fn)


@pytest.mark.parametrize("name", EVERY)
def test_debug_mode_has_no_objection(name: str) -> None:
    head, loss_fn = EVERY[name]
    net = net_of()
    warned(lambda: head(net(X)), loss_fn, net, debug=True)


def test_resumes_bit_for_bit() -> None:
    head, loss_fn = EVERY["hinge"]
    results = []
    for stop in (None, 3):
        net = net_of()
        optimizer = CurveBall(net.parameters(), lambda_interval=2)
        for step in range(8):
            if step == stop:
                saved = optimizer.state_dict()
                optimizer = CurveBall(net.parameters(), lambda_interval=2)
                optimizer.load_state_dict(saved)
            optimizer.step(lambda: head(net(X)), loss_fn)
        results.append([*net.parameters(), *optimizer.stats().values()])
    assert_equal(*results)


def test_in_float32_and_half_precision() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        net, x = net_of(dtype=dtype), (10 * X).to(dtype)
        optimizer = CurveBall(net.parameters())
        losses = [float(optimizer.step(lambda: net(x), lambda o: margins(o).relu().mean())[0]) for _ in range(60)]
        assert losses[-1] < losses[0]
        assert max(losses) < 3 * losses[0]


LOG_PROBABILITIES: dict[str, tuple[Loss, Loss]] = {
    "plain": (cross_entropy, lambda o: F.nll_loss(o, Y)),
    "module": (cross_entropy, lambda o: nn.NLLLoss()(o, Y)),
    "weight": (
        lambda o: F.cross_entropy(o, Y, weight=TARGET[0].abs(), ignore_index=2),
        lambda o: F.nll_loss(o, Y, weight=TARGET[0].abs(), ignore_index=2),
    ),
    "sum": (lambda o: F.cross_entropy(o, Y, reduction="sum"), lambda o: F.nll_loss(o, Y, reduction="sum")),
}


@pytest.mark.parametrize("curvature", ["auto", *METHODS])
@pytest.mark.parametrize("name", LOG_PROBABILITIES)
def test_log_probabilities_and_nll_loss_take_the_steps_of_logits_and_cross_entropy(name: str, curvature: str) -> None:
    of_logits, of_log_probabilities = LOG_PROBABILITIES[name]
    rows = []
    for last, loss_fn in ((None, of_logits), (nn.LogSoftmax(1), of_log_probabilities)):
        net = net_of(last)
        optimizer = CurveBall(
            net.parameters(), lr=0.9, lambd=0.6, weight_decay=0.02, lambda_interval=2, curvature=curvature
        )
        for _ in range(8):
            optimizer.step(lambda net=net: net(10 * X), loss_fn)
            rows.append(torch.stack([optimizer.stats()[k] for k in ("loss", "beta", "rho", "lambd", "ratio")]))
    torch.testing.assert_close(torch.stack(rows[8:]), torch.stack(rows[:8]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("rows", "shape", "dim"), [(24, (2, 3, 4, 3), 1), (1, (3,), 0)], ids=["images", "one sample"])
def test_log_probabilities_of_other_shapes(rows: int, shape: tuple[int, ...], dim: int) -> None:
    target = Y[0] if dim == 0 else Y[:24].view(2, 3, 4)
    found = []
    for last, loss in ((nn.Identity(), F.cross_entropy), (nn.LogSoftmax(dim), F.nll_loss)):
        torch.manual_seed(2)
        net = nn.Linear(6, 3).double()
        optimizer = CurveBall(net.parameters(), lambd=0.6)

        def model_fn(net: nn.Module = net, last: nn.Module = last) -> Tensor:
            out = net(X[:rows]).view(shape)
            return last(out if dim == 0 else out.movedim(-1, 1))

        for _ in range(4):
            optimizer.step(model_fn, lambda out, loss=loss: loss(out, target))
            found.append(torch.stack([optimizer.stats()[k] for k in ("loss", "beta", "rho")]))
    torch.testing.assert_close(torch.stack(found[4:]), torch.stack(found[:4]), rtol=1e-6, atol=1e-8)
