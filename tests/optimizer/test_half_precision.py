"""float16 and bfloat16, under autocast and as parameters: steps against those of float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curveball_fused import CurveBall
from tests.helpers.half_nets import HALVES, METHODS, X, Y, cross_entropy, net, one_step, under
from tests.helpers.training import BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("curvature", METHODS)
@pytest.mark.parametrize(("half", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_a_step_is_that_of_float32(backend: str, curvature: str, half: torch.dtype, tolerance: float) -> None:
    """To four roundings of the half precision: 2^-9 and 2^-12 each."""
    own, exact = (one_step(dtype, backend=backend, curvature=curvature) for dtype in (half, None))
    for name in ("loss", "beta", "rho", "predicted_change"):
        torch.testing.assert_close(own[name], exact[name], rtol=tolerance, atol=0)
    assert own["skipped_steps"] == 0


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "parameters"])
def test_training_follows_float32(half: torch.dtype, whole: bool) -> None:
    losses = []
    for precision in (None, half):
        model = net().to(half if whole and precision else torch.float32)
        optimizer = CurveBall(model.parameters())
        dtype = next(model.parameters()).dtype
        model_fn = under(None if whole else precision, model) if not whole else lambda m=model, d=dtype: m(X.to(d))
        losses.append(torch.stack([optimizer.step(model_fn, cross_entropy)[0] for _ in range(40)]))
        assert all(optimizer.state[p]["z"].dtype == torch.float32 for p in model.parameters())
    assert losses[0][-1] < 0.8 * losses[0][0]
    tolerance = {torch.bfloat16: 0.03, torch.float16: 0.005}[half]
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=0)
    assert losses[1].dtype == torch.float32


def test_the_loss_of_half_precision_outputs_is_of_float32() -> None:
    """bfloat16 has eight bits: most steps would not change the loss, and γ would be noise."""
    model = net()
    optimizer = CurveBall(model.parameters(), lambda_interval=1)
    ratios = []
    for _ in range(10):
        _, outputs = optimizer.step(under(torch.bfloat16, model), lambda out: cross_entropy(_of(out, torch.float32)))
        ratios.append(optimizer.stats()["ratio"])
    assert outputs.dtype == torch.bfloat16
    assert torch.stack(ratios).min() > 1.5 and torch.stack(ratios).max() < 2.5


def _of(out: Tensor, dtype: torch.dtype) -> Tensor:
    assert out.dtype == dtype
    return out


@pytest.mark.parametrize("whole", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", [None, torch.bfloat16, torch.float16])
def test_a_part_in_another_precision(whole: torch.dtype | None, part: torch.dtype | None) -> None:
    results = []
    for own, of_part in ((None, None), (whole, part)):
        model = net()
        optimizer = CurveBall(model.parameters(), average=0.8)
        for _ in range(5):
            few = (under(of_part, model, X[:8]), lambda out: F.cross_entropy(out, Y[:8]))
            optimizer.step(under(own, model), cross_entropy, curvature_batch=few)
        results.append([optimizer.stats()[name] for name in ("loss", "beta", "rho")])
    torch.testing.assert_close(results[1], results[0], rtol=0.03, atol=0)


@pytest.mark.parametrize("curvature", METHODS)
@pytest.mark.parametrize("half", HALVES)
def test_autocast_around_the_loop_sees_the_new_weights(curvature: str, half: torch.dtype) -> None:
    losses = []
    for around in (False, True):
        model = net()
        optimizer = CurveBall(model.parameters(), curvature=curvature)
        with torch.autocast("cpu", half, enabled=around):
            model_fn = (lambda m=model: m(X)) if around else under(half, model)
            losses.append(torch.stack([optimizer.step(model_fn, cross_entropy)[0] for _ in range(12)]))
    torch.testing.assert_close(losses[1], losses[0], rtol=0.01, atol=0)


@pytest.mark.parametrize("half", [None, *HALVES])
def test_precision_may_change_between_solves(half: torch.dtype | None) -> None:
    model = net()
    optimizer = CurveBall(model.parameters(), average=0.8, direction="gradient", solve_interval=3)
    first = optimizer.step(under(None, model), cross_entropy)[0]
    for precision in (half, half, None, half, torch.float16, None):
        last = optimizer.step(under(precision, model), cross_entropy)[0]
    assert last < first and optimizer.stats()["skipped_steps"] == 0


@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "parameters"])
@pytest.mark.parametrize("curvature", METHODS)
def test_debug_mode_in_float16(whole: bool, curvature: str) -> None:
    model = net().half() if whole else net()
    model_fn = (lambda: model(X.half())) if whole else under(torch.float16, model)
    optimizer = CurveBall(model.parameters(), debug=True, curvature=curvature)
    for factor in (1.0, 1.0, 1000.0):  # the last one overflows, and is skipped as without debug
        optimizer.step(model_fn, lambda out, factor=factor: factor * cross_entropy(out))
    assert optimizer.stats()["skipped_steps"] == 1


def test_float16_parameters_that_the_model_converts() -> None:
    """Their gradient is float16 whatever the model computes in."""
    figures = []
    for dtype in (torch.float32, torch.float16):
        model = net().to(dtype)
        optimizer = CurveBall(model.parameters(), auto_lambda=False, lambd=0.1)

        def model_fn(model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, {name: p.float() for name, p in model.named_parameters()}, X)

        for _ in range(3):
            optimizer.step(model_fn, lambda out: 1e-6 * cross_entropy(out))
        figures.append(optimizer.stats()["beta"])
    torch.testing.assert_close(figures[1], figures[0], rtol=0.01, atol=0)


@pytest.mark.parametrize(
    "options",
    [dict(average=0.7), dict(average=0.7, direction="gradient", solve_interval=2), dict(preconditioner="kronecker")],
)
@pytest.mark.parametrize("part", [False, True], ids=["", "part of the batch"])
def test_averaging_in_float16(options: dict[str, Any], part: bool) -> None:
    results = []
    for half in (None, torch.float16):
        model = net()
        optimizer = CurveBall(model.parameters(), **options)

        def few(model: nn.Module = model, half: Any = half) -> Tensor:
            return under(half, model)()[:8]

        given: Any = (few, lambda out: F.cross_entropy(out, Y[:8])) if part else None
        for _ in range(6):
            optimizer.step(under(half, model), cross_entropy, curvature_batch=given)
        results.append([optimizer.stats()[name] for name in ("loss", "beta", "rho")])
    # In a metric a gradient that is mostly rounding counts like any other, and ρ is a small difference: 0.004.
    for name, ours, theirs in zip(("loss", "beta", "rho"), results[1], results[0], strict=True):
        atol = 1e-3 if name == "rho" and "preconditioner" in options else 0
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=atol)


class NoFloat64(TorchDispatchMode):
    """Fails where a float64 tensor comes about that is not one of the few scalars of a step."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for t in tree_leaves(results):
            assert not (isinstance(t, Tensor) and t.dtype == torch.float64 and t.numel() > 16), (func, t.shape)
        return results


@pytest.mark.skipif("cpu" not in BACKENDS, reason="plain torch sums in float64 by converting")
@pytest.mark.parametrize("half", [None, *HALVES])
@pytest.mark.parametrize("curvature", ["linearize", "double_backward"])
@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "parameters"])
def test_nothing_is_converted_to_float64(half: torch.dtype | None, curvature: str, whole: bool) -> None:
    model, x = net(), X
    if whole and half:
        model, x = model.to(half), x.to(half)
    optimizer = CurveBall(model.parameters(), curvature=curvature, lambda_interval=2)
    optimizer.stats()
    model_fn = (lambda: model(x)) if whole else under(half, model)
    optimizer.step(model_fn, cross_entropy)  # makes the history
    with NoFloat64():
        for _ in range(3):
            optimizer.step(model_fn, cross_entropy)
    with pytest.raises(AssertionError), NoFloat64():
        X.double()
