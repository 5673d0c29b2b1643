"""The scales of float16: what they save from vanishing, how they follow overflows, torch's own scaler."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall, loss_scale, ops, state
from curveball_fused.backends.scalars import DIRECTION_DAMPING, SCALARS
from curveball_fused.loss_scale import Overflow
from curveball_fused.quadratic_model import runs
from tests.helpers.half_nets import METHODS, X, Y, cross_entropy, net, one_step, under
from tests.helpers.training import assert_equal


@pytest.mark.parametrize("curvature", METHODS)
def test_small_gradients_do_not_vanish_in_float16(monkeypatch: pytest.MonkeyPatch, curvature: str) -> None:
    """Gradients and z of 1e-7 and less are zero in float16, unless scaled. (Still smaller ones leave ρ to rounding.)"""
    size = 3e-6
    exact = one_step(None, size, curvature=curvature)

    def error(figures: dict[str, Tensor]) -> float:
        names = ("beta", "rho", "predicted_change")
        return max(abs(figures[name] / exact[name] - 1).item() for name in names)

    assert error(one_step(torch.float16, size, curvature=curvature)) < 0.001
    with monkeypatch.context() as without:
        for module in (loss_scale, runs):
            without.setattr(module, "scale_tangents", lambda v, *_: loss_scale.ScaledTangents(list(v), torch.ones(())))
        assert error(one_step(torch.float16, size, curvature=curvature)) > 0.006
    with monkeypatch.context() as without:
        without.setattr(state, "FIRST_LOSS_SCALE", 1.0)
        assert error(one_step(torch.float16, size, curvature=curvature)) > 0.006


def test_an_update_by_scaled_gradients_is_the_update() -> None:
    """z ← (ρ - βs) z - (β/S) (S r), with the scalars as they are: S, a power of two, changes no bit of them."""
    scalars = torch.rand(len(SCALARS), dtype=torch.float64)
    scalars[DIRECTION_DAMPING] = 3.0
    w, z, r = (torch.randn(50, dtype=torch.float64) for _ in range(3))
    found = []
    for s in (1.0, 2.0**12):
        w_new, z_new = w.clone(), z.clone()

        def update(given: Tensor, w: Tensor = w_new, z: Tensor = z_new, r: Tensor = s * r) -> Tensor:
            options: dict[str, Any] = dict(group_sizes=[1, 1], lr=[0.7, 0.5], weight_decay=[0.1, 0.0])
            return ops.update_groups_([w[:20], w[20:]], [z[:20], z[20:]], [r[:20], r[20:]], given, **options)

        found.append([loss_scale.update_by_scaled(update, scalars, torch.tensor(s)), w_new, z_new])
    assert_equal(*found)
    torch.testing.assert_close(z_new, (scalars[1] - scalars[0] * 3.0) * z - scalars[0] * r)
    assert_equal([found[1][0][DIRECTION_DAMPING:], found[1][0][:3]], [scalars[DIRECTION_DAMPING:], scalars[:3]])


@pytest.mark.parametrize("scaler", [False, True], ids=["own scale", "GradScaler"])
def test_an_overflow_skips_the_step_and_halves_the_scale(scaler: bool) -> None:
    """A cotangent of about 1 overflows with a scale of 2^17."""
    model = net()
    optimizer = CurveBall(model.parameters())
    given = torch.amp.GradScaler("cpu", init_scale=2.0**18) if scaler else None
    # A first step notices float16; without a gradient it changes nothing else.
    optimizer.step(under(torch.float16, model), lambda out: 0.0 * cross_entropy(out))
    optimizer._shared["scale"][0] = 2.0**18
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
    last = optimizer._shared["scale"][0].item() if given is None else given.get_scale()
    assert last == 2.0 ** (18 - skipped)


ECONOMIES: list[dict[str, Any]] = [
    {},
    dict(average=0.8, direction="gradient", solve_interval=4),
    dict(average=0.8, part=True),
    dict(preconditioner="kronecker"),
    dict(preconditioner="kronecker", part=True),
]


def step_of(optimizer: CurveBall, model: nn.Module, factor: float, part: Any = "") -> None:
    """A step in float16, with `part` the curvature of eight samples in that precision."""
    few = (under(part, model, X[:8]), lambda out: factor * F.cross_entropy(out, Y[:8]))
    given: Any = None if part == "" else few
    optimizer.step(under(torch.float16, model), lambda out: factor * cross_entropy(out), curvature_batch=given)


@pytest.mark.parametrize("options", ECONOMIES)
def test_an_overflow_is_recognized_in_every_kind_of_step(options: dict[str, Any]) -> None:
    model, part = net(), torch.float16 if "part" in options else ""
    optimizer = CurveBall(model.parameters(), **{name: value for name, value in options.items() if name != "part"})
    for _ in range(20):
        step_of(optimizer, model, 100.0, part)
    skipped = int(optimizer.stats()["skipped_steps"])
    assert 0 < skipped < 12
    assert optimizer._shared["scale"][0].log2() >= 16 - skipped


@pytest.mark.parametrize("options", ECONOMIES)
def test_a_bad_batch_leaves_the_scales(options: dict[str, Any]) -> None:
    model, part = net(), torch.float16 if "part" in options else ""
    optimizer = CurveBall(model.parameters(), **{name: value for name, value in options.items() if name != "part"})
    step_of(optimizer, model, torch.nan, part)
    for _ in range(5):
        step_of(optimizer, model, 1.0, part)
    assert optimizer._shared["scale"].tolist()[:2] == [2.0**16, 2.0**-6]


def test_tangents_that_overflow_get_smaller() -> None:
    """Inputs of some thousands: J takes tangents of the usual size to more than float16 holds."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(2048, 32), nn.ReLU(), nn.Linear(32, 4)), 8e3 * torch.rand(16, 2048)
    model[0].weight.data /= 8
    optimizer = CurveBall(model.parameters(), lr=1e-9)  # by which the weights stay, and z is what moves
    for _ in range(30):
        optimizer.step(under(torch.float16, model, x), lambda out: F.cross_entropy(out, Y[:16]))
    scale = optimizer._shared["scale"]
    assert scale[0] >= 1 and scale[1] < 2.0**-6 and scale[2] >= 10  # steps without an overflow


def test_scales_fall_at_once_and_grow_after_good_steps() -> None:
    scale, no, yes = state.fresh(1.0, torch.device("cpu"))["scale"], torch.tensor(False), torch.tensor(True)
    for _ in range(1999):
        scale = loss_scale.adapted(scale, Overflow(no, no))
    assert scale.tolist() == [2.0**16, 2.0**-6, 1999]
    scale = loss_scale.adapted(scale, Overflow(yes, no))
    assert scale.tolist() == [2.0**15, 2.0**-6, 0]
    scale = loss_scale.adapted(scale, Overflow(no, yes))
    assert scale.tolist() == [2.0**15, 2.0**-10, 0]
    for steps, expected in (
        (199, [2.0**15, 2.0**-10, 199]),
        (1, [2.0**15, 2.0**-9, 200]),
        (1800, [2.0**16, 2.0**-6, 0]),
    ):
        for _ in range(steps):
            scale = loss_scale.adapted(scale, Overflow(no, no))
        assert scale.tolist() == expected
    for _ in range(50):
        scale = loss_scale.adapted(scale, Overflow(yes, yes))
    assert scale.tolist() == [2.0**-16, 2.0**-14, 0]


def test_a_jacobian_that_is_not_finite_now_and_then_does_no_harm() -> None:
    """√0 is zero, and its derivative is not: such steps are skipped, and those between are those of float32."""
    figures = []
    for half in (None, torch.float16):
        model = net()
        optimizer = CurveBall(model.parameters(), auto_lambda=False)
        for _ in range(12):
            bad = under(half, model)
            optimizer.step(lambda bad=bad: bad() + 0 * (model[0](X) * 0).sqrt().sum(), cross_entropy)
        assert optimizer.stats()["skipped_steps"] == 12
        for _ in range(4):
            optimizer.step(under(half, model), cross_entropy)
        figures.append([optimizer.stats()[name] for name in ("loss", "beta", "rho")])
    torch.testing.assert_close(figures[1], figures[0], rtol=0.005, atol=0)


@pytest.mark.parametrize("size", [0.0, 1e-12, 3.7e-5, 1.0, 5e4, float("inf"), float("nan")])
def test_stretching_is_exact(size: float) -> None:
    v = [torch.randn(3, 5) * size, torch.randn(7) * size, torch.empty(0)]
    squares = torch.stack([t.double().square().sum() for t in v]).sum()
    tangents, factor = loss_scale.scale_tangents(v, squares, torch.tensor(0.125))
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


def test_a_scaler_outlives_optimizers_that_were_given_up() -> None:
    """One that comes upon the identity of another, whose step the scaler was told of, is refused once, and not passed
    over; one of an identity of its own is not concerned."""
    model, scaler = net(), torch.amp.GradScaler("cpu")
    given_up, other, heir = (CurveBall(model.parameters()) for _ in range(3))

    def step(optimizer: CurveBall) -> bool:
        before = next(model.parameters()).detach().clone()
        optimizer.step(under(torch.float16, model), cross_entropy, scaler=scaler)
        return not torch.equal(before, next(model.parameters()))

    assert step(given_up) and step(other)
    told = loss_scale._stand_ins[scaler]
    told[id(heir)] = told.pop(id(given_up))  # as where memory is used again
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"call scaler\.update"):
        step(heir)
    assert_equal(before, list(model.parameters()))
    scaler.update()
    assert step(heir) and step(other)


def test_a_large_loss_finds_its_scale() -> None:
    model = net()
    optimizer = CurveBall(model.parameters(), lambd=1e6)
    for _ in range(40):
        optimizer.step(under(torch.float16, model), lambda out: 1e6 * cross_entropy(out))
    assert optimizer.stats()["skipped_steps"] < 30 and optimizer._shared["scale"][0] < 1


def test_a_scaler_that_calls_the_step_is_told_what_to_do() -> None:
    model = net()
    optimizer = CurveBall(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match=r"write optimizer\.step\(model_fn, loss_fn, scaler=scaler\)"):
        scaler.step(optimizer)
    with pytest.raises(TypeError, match=r"must be a torch.amp.GradScaler; got int"):
        optimizer.step(under(torch.float16, model), cross_entropy, scaler=512)  # type: ignore[arg-type]
    assert optimizer.step(under(torch.float16, model), cross_entropy)[0].isfinite()


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
