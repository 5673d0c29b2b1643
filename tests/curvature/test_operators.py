"""Operators one by one: no tangent is lost, whatever torch's forward mode makes of it, and J is the transpose of Jᵀ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from curveball_fused import CurveBall
from curveball_fused.curvature.torch_modes import force_eager
from curveball_fused.explanation.trace_report import trace
from tests.helpers.jacobians import MODES, assert_products, linearized

X = torch.linspace(-1, 1, 24, dtype=torch.float64).sin().view(4, 6)
Run = Callable[[list[Tensor]], Tensor]


def params(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


MODES_OF_CDIST = (
    "use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"
)  # fmt: skip


def with_zero_distances(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The first two rows of b are the same function of the parameters as those of a."""
    return a, torch.cat((a[..., :2, :], b[..., 2:, :]), -2)


DISTANCES: dict[str, tuple[list[tuple[int, ...]], Run]] = {
    **{
        f"p = {p}": ([(4, 3), (5, 3)], lambda w, p=p: torch.cdist(*w, p) + w[0][:, :1])
        for p in (0.0, 0.7, 1.0, 1.5, 2.0, 3.0, torch.inf)
    },
    **{mode: ([(4, 3), (5, 3)], lambda w, mode=mode: torch.cdist(*w, compute_mode=mode)) for mode in MODES_OF_CDIST},
    **{
        f"many, {mode}": ([(30, 2), (3, 2)], lambda w, mode=mode: torch.cdist(*w, 2.0, mode)) for mode in MODES_OF_CDIST
    },
    **{
        f"zero distances, p = {p}": ([(4, 3), (5, 3)], lambda w, p=p: torch.cdist(*with_zero_distances(*w), p))
        for p in (1.0, 1.5, 2.0, 3.0, torch.inf)
    },
    "zero distances by products": (
        [(3, 2), (4, 2)],
        lambda w: torch.cdist(w[0].round(), torch.cat((w[0].detach().round()[:1], w[1]))).square()[:, 1:],
    ),
    "batches": ([(2, 1, 4, 3), (3, 5, 3)], lambda w: torch.cdist(*w)),
    "batches by products": ([(2, 1, 4, 3), (3, 27, 3)], lambda w: torch.cdist(*w)),
    "not contiguous": ([(3, 4), (3, 5)], lambda w: torch.cdist(w[0].t(), w[1].t()[::2])),
    "one constant": ([(4, 6)], lambda w: torch.cdist(X, w[0]) - torch.cdist(w[0], X[:1], 1.0).t()),
    "no columns": ([(4, 0), (2, 0), (4, 2)], lambda w: torch.cdist(w[0], w[1]) + w[2]),
    "no rows": ([(0, 3), (2, 3)], lambda w: torch.cdist(w[0], w[1]).sum() + w[1]),
    **{
        f"pdist, p = {p}": ([(5, 3)], lambda w, p=p: F.pdist(w[0], p) + w[0][0, 0])
        for p in (0.0, 0.7, 1.0, 1.5, 2.0, 3.0, torch.inf)
    },
    "pdist of equal rows": ([(5, 3)], lambda w: F.pdist(w[0][[0, 1, 0, 2, 4]])),
    "pdist of one row": ([(1, 3)], lambda w: F.pdist(w[0]).sum() + w[0]),
}
IDS = torch.tensor([[0, 2, 2, 5], [1, 3, 3, 1], [4, 4, 4, 4]])
STARTS = torch.tensor([0, 3, 3, 7])


def bag(**options: Any) -> Run:
    return lambda w: F.embedding_bag(IDS, w[0], **options)


def flat_bag(**options: Any) -> Run:
    return lambda w: F.embedding_bag(IDS.flatten(), w[0], STARTS, **options)


BAGS: dict[str, tuple[list[tuple[int, ...]], Run]] = {
    **{mode: ([(6, 3)], bag(mode=mode)) for mode in ("sum", "mean", "max")},
    **{f"{mode}, padded": ([(6, 3)], bag(mode=mode, padding_idx=4)) for mode in ("sum", "mean", "max")},
    **{f"{mode}, padded by -4": ([(6, 3)], flat_bag(mode=mode, padding_idx=-4)) for mode in ("sum", "mean", "max")},
    **{f"{mode}, offsets": ([(6, 3)], flat_bag(mode=mode)) for mode in ("sum", "mean", "max")},
    **{
        f"{mode}, last offset": (
            [(6, 3)],
            lambda w, mode=mode: F.embedding_bag(
                IDS.flatten(), w[0], torch.tensor([0, 3, 3, 12]), mode=mode, include_last_offset=True
            ),
        )
        for mode in ("sum", "mean", "max")
    },
    "factors": (
        [(6, 3), (3, 4)], lambda w: F.embedding_bag(IDS, w[0], mode="sum", per_sample_weights=w[1], padding_idx=3)
    ),
    "factors, offsets": (
        [(6, 3), (12,)],
        lambda w: F.embedding_bag(IDS.flatten(), w[0], STARTS, mode="sum", per_sample_weights=w[1].sin()),
    ),
    "factors of a constant table": (
        [(3, 4)], lambda w: F.embedding_bag(IDS, X.t().contiguous(), mode="sum", per_sample_weights=w[0])
    ),
    "no rows": ([(6, 3)], lambda w: F.embedding_bag(IDS[:0], w[0]).sum() + w[0]),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shapes", "run"), [*DISTANCES.values(), *BAGS.values()], ids=[*DISTANCES, *BAGS])
def test_rule(mode: Any, shapes: list[tuple[int, ...]], run: Run) -> None:
    assert_products(mode, run, params(*shapes))


@pytest.mark.parametrize(
    "run",
    [
        lambda w: torch.cdist(w[0] @ w[1].T, w[1] @ w[1].T),
        lambda w: torch.cdist((w[0] @ w[1].T).repeat(7, 1), w[1] @ w[1].T).sin(),
        lambda w: torch.cdist(w[0], w[1] @ w[0].T @ w[0], 1.0),
        lambda w: F.pdist((w[0] @ w[1].T).float()),
        lambda w: F.embedding_bag(IDS, w[0] @ w[1].T, mode="mean"),
        lambda w: F.embedding_bag(IDS, w[0], mode="sum", per_sample_weights=w[1][:3, :4]) @ w[1].T,
    ],
)
def test_rule_under_autocast(run: Run) -> None:
    """As exact as double backward is, both against float32."""
    wide = [p.detach().float().requires_grad_() for p in params((6, 5), (4, 5))]
    v = [torch.randn_like(p) for p in wide]
    results = []
    for mode, enabled in ((MODES[1], False), (MODES[1], True), (MODES[2], True)):
        linear = linearized(mode, lambda enabled=enabled: in_bfloat16(run, wide, enabled), wide)
        results.append(torch.cat([t.float().flatten() for t in (*linear.jvp(v), *linear.vjp(torch.ones(1)))]))
    exact, other, ours = results
    assert (ours - exact).norm() <= 2 * (other - exact).norm() + 2**-8 * exact.norm()


def in_bfloat16(run: Run, wide: list[Tensor], enabled: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        return run(wide).float().square().mean().view(1)


@torch.library.custom_op("test_operators::scaled", mutates_args=())
def scaled(x: Tensor, w: Tensor) -> Tensor:
    return x * w


scaled.register_autograd(
    lambda ctx, g: (g * ctx.saved_tensors[1], (g * ctx.saved_tensors[0]).sum(0)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("test_operators::halves", mutates_args=())
def halves(x: Tensor) -> list[Tensor]:
    return [x[:2].exp(), x[2:].clone()]


halves.register_autograd(
    lambda ctx, g: torch.cat((g[0] * ctx.saved_tensors[0].exp(), g[1])),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0][:2]),
)

library = torch.library.Library("test_operators_raw", "DEF")
library.define("cubed(Tensor x) -> Tensor")
library.impl("cubed", lambda x: x**3, "CPU")
torch.library.register_autograd(
    "test_operators_raw::cubed",
    lambda ctx, g: 3 * g * ctx.saved_tensors[0] ** 2,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("test_operators::detached", mutates_args=())
def detached(x: Tensor) -> Tensor:
    return x.clone()


detached.register_autograd(lambda ctx, g: g.detach().clone())  # a backward pass without a graph


@torch.library.custom_op("test_operators::once", mutates_args=())
def once(x: Tensor) -> Tensor:
    return x.clone()


once.register_autograd(once_differentiable(lambda ctx, g: g.clone()))


# torch's forward mode loses these tangents without a word, has none, or has one that the backward pass does not know.
BY_OWN_BACKWARD: dict[str, Run] = {
    "custom operator": lambda w: scaled(X @ w[0], w[1]),
    "custom operator, tensors in a list": lambda w: torch.cat(halves(X @ w[0])) * w[1],
    "library": lambda w: torch.ops.test_operators_raw.cubed(X @ w[0]) * w[1],
    "products by index": lambda w: torch.scatter_reduce(
        w[0], 0, torch.tensor([[0] * 6, [3] * 6]), X[:2] * w[1], "prod"
    ),
    "grid sample": lambda w: F.grid_sample(
        w[0].view(1, 1, 6, 6), (X @ w[0]).view(1, 4, 3, 2).tanh(), align_corners=False
    ),
    "index reduce": lambda w: w[0].index_reduce(0, torch.tensor([1, 1, 3, 0]), X * w[1], "mean"),
    "Cholesky of a triangle": lambda w: torch.linalg.cholesky((w[0] @ w[0].T).tril() + 9 * torch.eye(6) + w[1].diag()),
    "strided scatter": lambda w: torch.as_strided_scatter(w[0], X[:2, :2] * w[1][:2], (2, 2), (7, 2), 1),
    "unpooling": lambda w: F.max_unpool1d((X @ w[0])[None], torch.tensor([[[0, 3, 3, 7, 8, 9]] * 4]), 2) + w[1].sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_OWN_BACKWARD)
def test_a_call_is_followed_by_its_own_backward_pass(name: str) -> None:
    run, w = BY_OWN_BACKWARD[name], params((6, 6), (6,))
    assert_products(MODES[2], run, w)
    with force_eager():
        _, functions = trace(lambda: run(w), w)
    assert "double backward" in [f.handled_by for f in functions]


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda h: detached(h) + h, "detached.*loses its tangent"),
        (lambda h: once(h) + h, "once.*loses its tangent"),
        (lambda h: h.to_sparse().to_dense(), "to_sparse"),
    ],
)
def test_a_backward_pass_that_cannot_be_differentiated_is_refused(run: Callable[[Tensor], Tensor], words: str) -> None:
    net = nn.Linear(6, 6).double()
    optimizer = CurveBall(net.parameters(), curvature="linearize")
    with pytest.raises(RuntimeError, match=f"cannot follow this model: .*{words}"):
        optimizer.step(lambda: run(net(X)), lambda out: out.square().mean())
    _, functions = trace(lambda: run(net(X)), list(net.parameters()))
    assert "refused" in [f.handled_by for f in functions]


def test_forward_mode_inside_the_model() -> None:
    def run(w: list[Tensor]) -> Tensor:
        with fwAD.dual_level():
            return fwAD.unpack_dual(torch.tanh(fwAD.make_dual(X @ w[0], X * w[1]))).tangent

    w = params((6, 6), (6,))
    with pytest.raises(Exception, match="forward mode inside the model"):
        assert_products(MODES[2], run, w)
    assert_products(MODES[1], run, w)


def test_dual_numbers_are_not_taken_where_they_are_of_another_function() -> None:
    def run(w: list[Tensor]) -> Tensor:
        return torch.linalg.cholesky((w[0] @ w[0].T).tril() + 9 * torch.eye(6))

    with pytest.raises(NotImplementedError, match=r"linalg_cholesky: .* not the transpose of its backward pass"):
        assert_products(MODES[0], run, params((6, 6)))
    assert_products(MODES[1], run, params((6, 6)))


@pytest.mark.parametrize(
    "run",
    [
        lambda net: F.embedding(IDS, net.weight, scale_grad_by_freq=True),
        lambda net: F.embedding(IDS, net.weight, None, None, 2.0, True),
        lambda net: F.embedding_bag(IDS, net.weight, scale_grad_by_freq=True),
        lambda net: torch.embedding(net.weight, IDS, -1, True),
    ],
)
@pytest.mark.parametrize("curvature", ["auto", "linearize", "forward", "double_backward"])
def test_a_gradient_that_is_divided_by_frequency_is_refused(run: Callable[[nn.Module], Tensor], curvature: str) -> None:
    """Its derivative, by torch, is not divided, so that no method has a pair of transposes."""
    net = nn.Linear(6, 6).double()
    optimizer = CurveBall(net.parameters(), curvature=curvature)
    with pytest.raises(RuntimeError, match=r"embedding.* with scale_grad_by_freq=True, .*leave it out"):
        optimizer.step(lambda: run(net), lambda out: out.square().mean())
