"""float16 and bfloat16, under autocast and as parameters: steps against those of float32, and the loss scale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import BACKENDS, assert_equal

from curveball_fused import CurveBall, loss_scale
from curveball_fused.loss_scale import Overflow

HALVES = [torch.bfloat16, torch.float16]
WAYS = ["linearize", "forward", "double_backward"]
X = torch.randn(24, 6, generator=torch.Generator().manual_seed(2))
Y = torch.arange(24) % 4


def net() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def under(half: torch.dtype | None, model: nn.Module, x: Tensor = X) -> Callable[[], Tensor]:
    def model_fn() -> Tensor:
        with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
            return model(x)

    return model_fn


def cross_entropy(out: Tensor) -> Tensor:
    return F.cross_entropy(out, Y)


def one_step(half: torch.dtype | None, size: float = 1.0, **options: Any) -> dict[str, Tensor]:
    """The figures of a step on a batch of its own, after some in float32; `size` shrinks gradient and state alike."""
    model = net()
    optimizer = CurveBall(model.parameters(), lambd=0.3, auto_lambda=False, **options)

    def loss_fn(out: Tensor) -> Tensor:
        return size * cross_entropy(out)

    for _ in range(6):
        optimizer.step(under(None, model), loss_fn)
    if half is not None:
        optimizer.state["curveball"]["half"] = str(half).removeprefix("torch.")
    optimizer.step(under(half, model, X.flip(1)), loss_fn)
    return optimizer.stats()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("curvature", WAYS)
@pytest.mark.parametrize(("half", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_a_step_is_that_of_float32(backend: str, curvature: str, half: torch.dtype, tolerance: float) -> None:
    """To four roundings of the half precision: 2^-9 and 2^-12 each."""
    own, exact = (one_step(dtype, backend=backend, curvature=curvature) for dtype in (half, None))
    for name in ("loss", "beta", "rho", "predicted_change"):
        torch.testing.assert_close(own[name], exact[name], rtol=tolerance, atol=0)
    assert own["skipped_steps"] == 0


@pytest.mark.parametrize("curvature", WAYS)
def test_small_gradients_do_not_vanish_in_float16(monkeypatch: pytest.MonkeyPatch, curvature: str) -> None:
    """Gradients and z of 1e-7 and less are zero in float16, unless scaled."""
    size = 1e-6
    exact = one_step(None, size, curvature=curvature)

    def error(figures: dict[str, Tensor]) -> float:
        names = ("beta", "rho", "predicted_change")
        return max(abs(figures[name] / exact[name] - 1).item() for name in names)

    assert error(one_step(torch.float16, size, curvature=curvature)) < 0.006
    with monkeypatch.context() as without:
        without.setattr(loss_scale, "stretched", lambda v, *_: loss_scale.Stretched(list(v), torch.ones(())))
        assert error(one_step(torch.float16, size, curvature=curvature)) > 0.006
    with monkeypatch.context() as without:
        without.setattr(loss_scale, "initial", lambda device: torch.tensor([1.0, 2.0**-6, 0.0], dtype=torch.float64))
        assert error(one_step(torch.float16, size, curvature=curvature)) > 0.006


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
    torch.testing.assert_close(losses[1], losses[0], rtol=0.03, atol=0)
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


@pytest.mark.parametrize("scaler", [False, True], ids=["own scale", "GradScaler"])
def test_an_overflow_skips_the_step_and_halves_the_scale(scaler: bool) -> None:
    """A cotangent of about 1 overflows with a scale of 2^17."""
    model = net()
    optimizer = CurveBall(model.parameters())
    given = torch.amp.GradScaler("cpu", init_scale=2.0**18) if scaler else None
    # A first step notices float16; without a gradient it changes nothing else.
    optimizer.step(under(torch.float16, model), lambda out: 0.0 * cross_entropy(out))
    optimizer.state["curveball"]["scale"][0] = 2.0**18
    before = [p.detach().clone() for p in model.parameters()]
    for i in range(12):
        optimizer.step(under(torch.float16, model), lambda out: 24.0 * cross_entropy(out), scaler=given)
        if i == 1:
            assert optimizer.stats()["skipped_steps"] == 2
            assert_equal(before, list(model.parameters()))
        if given is not None:
            given.update()
    skipped = int(optimizer.stats()["skipped_steps"])
    assert 2 <= skipped < 10 and not torch.equal(before[0], next(model.parameters()))
    last = optimizer.state["curveball"]["scale"][0].item() if given is None else given.get_scale()
    assert last == 2.0 ** (18 - skipped)


ECONOMIES: list[dict[str, Any]] = [{}, dict(average=0.8, solve_interval=4), dict(average=0.8, part=True)]


def step_of(optimizer: CurveBall, model: nn.Module, factor: float, part: Any = "") -> None:
    """A step in float16, with `part` the curvature of eight samples in that precision."""
    few = (under(part, model, X[:8]), lambda out: factor * F.cross_entropy(out, Y[:8]))
    given: Any = None if part == "" else few
    optimizer.step(under(torch.float16, model), lambda out: factor * cross_entropy(out), curvature_batch=given)


@pytest.mark.parametrize("options", ECONOMIES)
def test_an_overflow_is_recognised_in_every_kind_of_step(options: dict[str, Any]) -> None:
    model, part = net(), torch.float16 if options.pop("part", False) else ""
    optimizer = CurveBall(model.parameters(), **options)
    for _ in range(20):
        step_of(optimizer, model, 100.0, part)
    skipped = int(optimizer.stats()["skipped_steps"])
    assert 0 < skipped < 12
    assert optimizer.state["curveball"]["scale"][0].log2() >= 16 - skipped


@pytest.mark.parametrize("options", ECONOMIES)
def test_a_bad_batch_leaves_the_scales(options: dict[str, Any]) -> None:
    model, part = net(), torch.float16 if options.pop("part", False) else ""
    optimizer = CurveBall(model.parameters(), **options)
    step_of(optimizer, model, torch.nan, part)
    for _ in range(5):
        step_of(optimizer, model, 1.0, part)
    assert optimizer.state["curveball"]["scale"].tolist()[:2] == [2.0**16, 2.0**-6]


def test_tangents_that_overflow_get_smaller() -> None:
    """Inputs of some thousands: J takes tangents of the usual size to more than float16 holds."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(2048, 32), nn.ReLU(), nn.Linear(32, 4)), 8e3 * torch.rand(16, 2048)
    model[0].weight.data /= 8
    optimizer = CurveBall(model.parameters(), lr=1e-9)  # by which the weights stay, and z is what moves
    for _ in range(30):
        optimizer.step(under(torch.float16, model, x), lambda out: F.cross_entropy(out, Y[:16]))
    scale = optimizer.state["curveball"]["scale"]
    assert scale[0] >= 1 and scale[1] < 2.0**-6 and scale[2] >= 10  # steps without an overflow


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


@pytest.mark.parametrize("curvature", WAYS)
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
    optimizer = CurveBall(model.parameters(), average=0.8, solve_interval=3)
    first = optimizer.step(under(None, model), cross_entropy)[0]
    for precision in (half, half, None, half, torch.float16, None):
        last = optimizer.step(under(precision, model), cross_entropy)[0]
    assert last < first and optimizer.stats()["skipped_steps"] == 0


@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "parameters"])
@pytest.mark.parametrize("curvature", WAYS)
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


def test_scales_fall_at_once_and_grow_after_two_thousand_good_steps() -> None:
    scale, no, yes = loss_scale.initial(torch.device("cpu")), torch.tensor(False), torch.tensor(True)
    for _ in range(1999):
        scale = loss_scale.adapted(scale, Overflow(no, no))
    assert scale.tolist() == [2.0**16, 2.0**-6, 1999]
    scale = loss_scale.adapted(scale, Overflow(yes, no))
    assert scale.tolist() == [2.0**15, 2.0**-6, 0]
    scale = loss_scale.adapted(scale, Overflow(no, yes))
    assert scale.tolist() == [2.0**15, 2.0**-10, 0]
    for _ in range(2000):
        scale = loss_scale.adapted(scale, Overflow(no, no))
    assert scale.tolist() == [2.0**16, 2.0**-9, 0]
    for _ in range(40):
        scale = loss_scale.adapted(scale, Overflow(yes, yes))
    assert scale.tolist() == [1, 2.0**-40, 0]


@pytest.mark.parametrize("size", [0.0, 1e-12, 3.7e-5, 1.0, 5e4, float("inf"), float("nan")])
def test_stretching_is_exact(size: float) -> None:
    v = [torch.randn(3, 5) * size, torch.randn(7) * size, torch.empty(0)]
    squares = torch.stack([t.double().square().sum() for t in v]).sum()
    tangents, factor = loss_scale.stretched(v, squares, torch.tensor(0.125))
    assert torch.frexp(factor).mantissa == 0.5  # a power of two
    assert_equal([t / factor for t in tangents], v)
    if 0 < size < float("inf"):
        assert 0.05 < torch.cat([t.flatten() for t in tangents]).square().mean().sqrt() < 0.3
    else:
        assert factor == 1


def test_torchs_scaler_takes_turns_with_another_optimizer() -> None:
    """As in adversarial training: one scaler, an ordinary optimizer and this one, and two of these."""
    model, other, third = net(), net(), net()
    optimizer, twin = CurveBall(model.parameters()), CurveBall(third.parameters())
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=2)
    for _ in range(4):
        scaler.scale(cross_entropy(under(torch.float16, other)())).backward()
        scaler.step(sgd)
        for o, m in ((optimizer, model), (twin, third)):
            o.step(under(torch.float16, m), cross_entropy, scaler=scaler)
        scaler.update()
        sgd.zero_grad()
    assert scaler.get_scale() == 2048 and optimizer.stats()["skipped_steps"] == 0
    assert_equal(list(model.parameters()), list(third.parameters()))


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_a_scaler_is_told_in_every_precision_and_must_be_updated(half: torch.dtype | None) -> None:
    model = net()
    optimizer, scaler = CurveBall(model.parameters()), torch.amp.GradScaler("cpu", growth_interval=1)
    optimizer.step(under(half, model), cross_entropy, scaler=scaler)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"call scaler\.update"):
        optimizer.step(under(half, model), cross_entropy, scaler=scaler)
    assert_equal(before, list(model.parameters()))
    scaler.update()
    assert scaler.get_scale() == 2.0**17
    optimizer.step(under(half, model), cross_entropy, scaler=scaler)


def test_a_scaler_that_calls_the_step_is_told_what_to_do() -> None:
    model = net()
    optimizer = CurveBall(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match=r"write optimizer\.step\(model_fn, loss_fn, scaler=scaler\)"):
        scaler.step(optimizer, under(torch.float16, model), cross_entropy)
    with pytest.raises(TypeError, match=r"must be a torch.amp.GradScaler; got int"):
        optimizer.step(under(torch.float16, model), cross_entropy, scaler=512)  # type: ignore[arg-type]
    assert optimizer.step(under(torch.float16, model), cross_entropy)[0].isfinite()


@pytest.mark.parametrize("options", [dict(average=0.7), dict(average=0.7, solve_interval=2)])
@pytest.mark.parametrize("part", [False, True], ids=["", "part of the batch"])
def test_economy_in_float16(options: dict[str, Any], part: bool) -> None:
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
    torch.testing.assert_close(results[1], results[0], rtol=0.02, atol=0)


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


def test_resumes_bit_for_bit_in_float16() -> None:
    model = net()
    optimizer = CurveBall(model.parameters())
    for _ in range(3):
        optimizer.step(under(torch.float16, model), cross_entropy)
    twin = copy.deepcopy(model)
    other = CurveBall(twin.parameters())
    other.load_state_dict(optimizer.state_dict())
    for o, m in ((optimizer, model), (other, twin)):
        for _ in range(3):
            o.step(under(torch.float16, m), cross_entropy)
    assert_equal(list(model.parameters()), list(twin.parameters()))
    assert_equal(list(optimizer.history().values()), list(other.history().values()))
