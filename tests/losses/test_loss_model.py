"""Closed-form Gauss-Newton products against autograd's Hessian of the loss, in every variant that torch offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall, backends
from curveball_fused.losses import loss_model as losses
from curveball_fused.losses.loss_model import LossModel

torch.manual_seed(0)
CLASSES = 5
LOGITS = torch.randn(7, CLASSES, dtype=torch.float64)
IMAGES = torch.randn(3, CLASSES, 2, 2, dtype=torch.float64)
INDEX = torch.tensor([0, 4, 2, 2, 1, 3, 0])
IMAGE_INDEX = torch.randint(0, CLASSES, (3, 2, 2))
PROBABILITIES = torch.rand(7, CLASSES, dtype=torch.float64).softmax(1)
WEIGHT = torch.rand(CLASSES, dtype=torch.float64) + 0.5
TARGET = torch.randn(7, CLASSES, dtype=torch.float64)
LABELS = torch.rand(7, CLASSES, dtype=torch.float64)

LOG_PROBABILITIES, IMAGE_LOG_PROBABILITIES = LOGITS.log_softmax(1), IMAGES.log_softmax(1)

Case = tuple[Tensor, Callable[[Tensor], Tensor]]
RECOGNIZED: dict[str, Case] = {
    f"cross entropy {reduction} {name}": (
        x,
        lambda o, y=y, k=k, r=reduction: F.cross_entropy(o, y, reduction=r, **k),
    )
    for reduction in ("mean", "sum")
    for name, x, y, k in [
        ("plain", LOGITS, INDEX, {}),
        ("weight", LOGITS, INDEX, dict(weight=WEIGHT)),
        ("ignore_index", LOGITS, INDEX, dict(ignore_index=2)),
        ("smoothing", LOGITS, INDEX, dict(label_smoothing=0.2)),
        ("all", LOGITS, INDEX, dict(weight=WEIGHT, ignore_index=2, label_smoothing=0.2)),
        ("images", IMAGES, IMAGE_INDEX, dict(weight=WEIGHT, ignore_index=0, label_smoothing=0.1)),
        ("one sample", LOGITS[0], INDEX[0], dict(weight=WEIGHT)),
        ("probabilities", LOGITS, PROBABILITIES, {}),
        ("probabilities, all", LOGITS, PROBABILITIES, dict(weight=WEIGHT, label_smoothing=0.2)),
        ("probabilities, images", IMAGES, IMAGES.softmax(1).roll(1, 0), dict(label_smoothing=0.1)),
    ]
}
RECOGNIZED |= {
    f"mse {reduction}": (LOGITS, lambda o, r=reduction: F.mse_loss(o, TARGET, reduction=r))
    for reduction in ("mean", "sum")
}
RECOGNIZED |= {
    f"bce {reduction} {name}": (
        LOGITS,
        lambda o, k=k, r=reduction: F.binary_cross_entropy_with_logits(o, LABELS, reduction=r, **k),
    )
    for reduction in ("mean", "sum")
    for name, k in [
        ("plain", {}),
        ("weight", dict(weight=torch.rand(7, 1, dtype=torch.float64))),
        ("pos_weight", dict(weight=WEIGHT, pos_weight=WEIGHT.flip(0))),
    ]
}
RECOGNIZED |= {
    "targets in bytes": (LOGITS, lambda o: F.cross_entropy(o, INDEX.to(torch.uint8))),
    "modules": (LOGITS, lambda o: torch.nn.CrossEntropyLoss()(o, INDEX)),
    "view": (LOGITS.view(7, 1, CLASSES), lambda o: F.cross_entropy(o.view(-1, CLASSES), INDEX)),
    "transpose": (LOGITS.T.contiguous(), lambda o: F.cross_entropy(o.transpose(0, 1), INDEX)),
    "slice": (LOGITS, lambda o: F.cross_entropy(o[:-2, 1:].contiguous(), INDEX[:-2] % 4)),
    "squeeze": (LOGITS[:, :1], lambda o: F.mse_loss(o.squeeze(1), TARGET[:, 0])),
    "permute and flatten": (
        IMAGES,
        lambda o: F.cross_entropy(o.permute(0, 2, 3, 1).flatten(0, 2), IMAGE_INDEX.flatten()),
    ),
}
RECOGNIZED |= {
    "scaled cross": (LOGITS, lambda o: 0.5 * F.cross_entropy(o, INDEX)),
    "scaled and shifted": (LOGITS, lambda o: (3 + F.mse_loss(o, TARGET) - 1) / 4),
    "sum of two, cross": (LOGITS, lambda o: F.cross_entropy(o, INDEX) + F.mse_loss(o, TARGET)),
    "weighted sum": (LOGITS, lambda o: 0.25 * F.mse_loss(o, TARGET) + 2 * F.mse_loss(o[:3], LABELS[:3]) / 3 + 1),
    "sum of a list, cross": (
        LOGITS,
        lambda o: sum([F.cross_entropy(o[:, :3], INDEX % 3), 0.1 * F.mse_loss(o[:, 3:], TARGET[:, 3:])]),  # type: ignore[arg-type, return-value]
    ),
    "the same twice": (LOGITS, lambda o: (loss := F.mse_loss(o, TARGET)) + loss),
    "nothing of it": (LOGITS, lambda o: F.mse_loss(o, TARGET) + 0 * F.mse_loss(o, LABELS)),
}
NLL: dict[str, tuple[Tensor, Tensor, dict[str, Any]]] = {
    "plain": (LOG_PROBABILITIES, INDEX, {}),
    "sum": (LOG_PROBABILITIES, INDEX, dict(reduction="sum")),
    "weight": (LOG_PROBABILITIES, INDEX, dict(weight=WEIGHT)),
    "ignore_index": (LOG_PROBABILITIES, INDEX, dict(ignore_index=2)),
    "all": (LOG_PROBABILITIES, INDEX, dict(weight=WEIGHT, ignore_index=2, reduction="sum")),
    "images": (IMAGE_LOG_PROBABILITIES, IMAGE_INDEX, dict(weight=WEIGHT, ignore_index=0)),
    "one sample": (LOG_PROBABILITIES[0], INDEX[0], dict(weight=WEIGHT)),
    "targets in bytes": (LOG_PROBABILITIES, INDEX.to(torch.uint8), {}),
}


def _zero_first(x: Tensor) -> Tensor:
    x[0] = 0
    return x


GENERAL: dict[str, Case] = {
    "times a tensor": (LOGITS, lambda o: F.cross_entropy(o, INDEX) * WEIGHT[0]),
    "product of two": (LOGITS, lambda o: F.cross_entropy(o, INDEX) * F.mse_loss(o, TARGET)),
    "divided by one": (LOGITS, lambda o: 2 / (1 + F.mse_loss(o, TARGET))),
    "difference of two": (LOGITS, lambda o: F.cross_entropy(o, INDEX) - 0.1 * F.mse_loss(o, TARGET)),
    "negative weight": (LOGITS, lambda o: F.cross_entropy(o, INDEX) + F.mse_loss(o, TARGET) * -0.1),
    "sum with another": (LOGITS, lambda o: F.cross_entropy(o, INDEX) + F.huber_loss(o, TARGET)),
    "added with a factor": (LOGITS, lambda o: torch.add(F.cross_entropy(o, INDEX), F.mse_loss(o, TARGET), alpha=2)),
    "added in place": (LOGITS, lambda o: F.cross_entropy(o, INDEX).add_(F.mse_loss(o, TARGET))),
    "subtracted from a number": (LOGITS, lambda o: 3 - F.mse_loss(o, TARGET)),
    "not applied to the outputs": (LOGITS, lambda o: F.cross_entropy(o * 2, INDEX)),
    "huber": (LOGITS, lambda o: F.huber_loss(o, TARGET)),
    "exponential": (LOGITS, lambda o: torch.exp(-o * TARGET).mean()),
    "nll of what is not the outputs": (LOGITS, lambda o: F.nll_loss(o.log_softmax(1), INDEX)),
    "nll of probabilities": (PROBABILITIES, lambda o: F.nll_loss(o.log(), INDEX)),
    "mse of a vector of one": (LOGITS, lambda o: F.mse_loss(o, TARGET).view(1)),
    "reduction none": (LOGITS, lambda o: F.cross_entropy(o, INDEX, reduction="none").mean()),
    "target that depends on the outputs": (LOGITS, lambda o: F.mse_loss(o[:3], o[3:6])),
    "distillation from itself": (LOGITS, lambda o: F.cross_entropy(o[:3], o[3:6].softmax(1))),
    "copy edited in place": (LOGITS, lambda o: F.cross_entropy(o[torch.arange(7)].div_(0.5), INDEX)),
    "copy edited in place later": (LOGITS.T.contiguous(), lambda o: F.mse_loss(_zero_first(o.T.contiguous()), TARGET)),
    "halved in place": (LOGITS, lambda o: F.cross_entropy(o, INDEX).div_(2)),
    "swapped mse": (LOGITS, lambda o: F.mse_loss(TARGET, o)),
}


@pytest.fixture(params=["closed forms", "operators in torch", "native operators"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By closed forms, by the loss operators in plain torch, or by those of the native library."""
    if request.param == "native operators":
        if not backends.has_operators():
            pytest.skip("needs the native kernels")
    else:
        monkeypatch.setattr(backends, "choose", lambda backend, device: "torch")
        monkeypatch.setattr(backends, "has_fused_losses", lambda chosen: request.param == "operators in torch")


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", [*RECOGNIZED, *GENERAL])
def test_against_the_hessian(name: str, sign: float) -> None:
    outputs, loss_fn = (RECOGNIZED | GENERAL)[name]

    def flat(x: Tensor) -> Tensor:
        return sign * loss_fn(x.view(outputs.shape)).reshape(())

    model = LossModel(loss_fn, outputs, sign, [])
    torch.testing.assert_close(model.loss, loss_fn(outputs).reshape(()))
    gradient = torch.autograd.functional.jacobian(flat, outputs.flatten())
    hessian = torch.autograd.functional.hessian(flat, outputs.flatten())
    jz, jr = torch.randn_like(outputs), torch.randn_like(outputs)
    c, products = model.cotangent(jz)
    u, v = jz.flatten(), jr.flatten()
    torch.testing.assert_close(c.flatten(), hessian @ u + gradient, rtol=1e-11, atol=1e-12)
    expected = torch.stack((gradient @ u, u @ hessian @ u, gradient @ v, u @ hessian @ v, v @ hessian @ v))
    torch.testing.assert_close(products(jr)[:5], expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model.gradient().flatten(), gradient, rtol=1e-11, atol=1e-12)
    assert c.shape == model.gradient().shape == outputs.shape and products(jr).dtype == torch.float64


@pytest.mark.usefixtures("no_double_backward")
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", list(NLL))
def test_nll_loss_has_its_own_gradient_and_the_curvature_of_cross_entropy(name: str, sign: float) -> None:
    outputs, target, options = NLL[name]
    jz, jr = torch.randn_like(outputs), torch.randn_like(outputs)
    nll = LossModel(lambda o: F.nll_loss(o, target, **options), outputs, sign, [])
    cross_entropy = LossModel(lambda o: F.cross_entropy(o, target, **options), outputs, sign, [])
    leaf = outputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sign * F.nll_loss(leaf, target, **options), leaf)
    c, products = nll.cotangent(jz)
    expected_c, expected_products = cross_entropy.cotangent(jz)
    torch.testing.assert_close(nll.loss, cross_entropy.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(nll.gradient(), gradient, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(c - gradient, expected_c - cross_entropy.gradient(), rtol=1e-11, atol=1e-12)
    ours, expected = products(jr), expected_products(jr)
    curvature = [1, 3, 4]
    torch.testing.assert_close(ours[curvature], expected[curvature], rtol=1e-11, atol=1e-12)
    along = torch.stack(((gradient * jz).sum(), (gradient * jr).sum()))
    torch.testing.assert_close(ours[[0, 2]], along, rtol=1e-11, atol=1e-12)


@pytest.fixture
def no_double_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("the loss was not recognized")

    monkeypatch.setattr(losses, "_by_autograd", refuse)


@pytest.mark.usefixtures("no_double_backward")
@pytest.mark.parametrize("name", list(RECOGNIZED))
def test_is_recognized(name: str) -> None:
    outputs, loss_fn = RECOGNIZED[name]
    LossModel(loss_fn, outputs, 1.0, [])


def test_the_fused_kernels_serve_the_usual_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but probabilities as targets, images, a single sample, and a weight that does not trail the outputs."""
    served = set()
    for name, (outputs, loss_fn) in RECOGNIZED.items():
        monkeypatch.setattr(backends, "has_fused_losses", lambda chosen: True)
        monkeypatch.setattr(losses, "products", lambda *_, name=name: served.add(name))
        monkeypatch.setattr(losses, "_by_autograd", Mock())
        LossModel(loss_fn, outputs, 1.0, [])
    not_fused = ("probabilities", "cross entropy mean images", "cross entropy sum images", "one sample")
    assert {name for name in served if not any(words in name for words in not_fused)} == {
        "bce mean weight",
        "bce sum weight",
    }


@pytest.mark.usefixtures("no_double_backward")
@pytest.mark.parametrize("name", list(GENERAL))
def test_is_not_mistaken_for_another(name: str) -> None:
    outputs, loss_fn = GENERAL[name]
    with pytest.raises(AssertionError, match="not recognized"):
        LossModel(loss_fn, outputs, 1.0, [])


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [n for n in RECOGNIZED if "cross" not in n or "plain" in n or "smooth" in n])
def test_positive_semi_definite_in_low_precision(name: str, dtype: torch.dtype, scale: float) -> None:
    """Also where the softmax is saturated, and where the tangent is nearly the same in all classes."""
    outputs, loss_fn = RECOGNIZED[name]

    model = LossModel(loss_fn, (scale * outputs).to(dtype), 1.0, [])
    v = (1000 + torch.randn_like(outputs)).to(dtype)
    c, products = model.cotangent(v)
    result = products(v)
    assert c.dtype == dtype
    assert result[1] >= 0 and result[4] >= 0


def test_a_tangent_that_is_nearly_the_same_in_all_classes() -> None:
    v = 1e4 + LOGITS
    low = LossModel(lambda o: F.cross_entropy(o, INDEX), LOGITS.float(), 1.0, []).cotangent(v.float())[1](v.float())
    high = LossModel(lambda o: F.cross_entropy(o, INDEX), LOGITS, 1.0, []).cotangent(v)[1](v)
    torch.testing.assert_close(low, high, rtol=5e-3, atol=0)  # 1e4 rounds by 5e-4


def test_half_precision_logits_are_worked_on_in_float32() -> None:
    outputs, v = LOGITS.bfloat16(), TARGET.bfloat16()
    low = LossModel(lambda o: F.cross_entropy(o, INDEX), outputs, 1.0, []).cotangent(v)[1](v)
    high = LossModel(lambda o: F.cross_entropy(o, INDEX), outputs.double(), 1.0, []).cotangent(v.double())[1](
        v.double()
    )
    torch.testing.assert_close(low, high, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("loss", [F.mse_loss, F.binary_cross_entropy_with_logits])
def test_targets_are_not_rounded_to_the_precision_of_the_outputs(loss: Any) -> None:
    outputs, target = LOGITS.bfloat16(), LABELS.float()
    low = LossModel(lambda o: loss(o, target), outputs, 1.0, []).cotangent(outputs)[1](outputs)
    high = outputs.double()
    expected = LossModel(lambda o: loss(o, target.double()), high, 1.0, []).cotangent(high)[1](high)
    torch.testing.assert_close(low, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("route")
def test_every_target_ignored_is_not_finite() -> None:
    """So that the step is skipped."""
    model = LossModel(lambda o: F.cross_entropy(o, torch.full((7,), 2), ignore_index=2), LOGITS, 1.0, [])
    products = model.cotangent(LOGITS)[1](LOGITS)
    assert not torch.isfinite(model.loss) and not torch.isfinite(products).all()


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda o: F.cross_entropy(o, INDEX, reduction="none"), RuntimeError, r"scalar.*\(7,\).*mean"),
        (lambda o: F.cross_entropy(o, INDEX).item(), TypeError, "float"),
        (lambda o: F.cross_entropy(o.detach(), INDEX), RuntimeError, "does not depend on the outputs"),
        (lambda o: None, TypeError, "NoneType"),
    ],
)
def test_bad_losses(loss_fn: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LossModel(loss_fn, LOGITS, 1.0, [])


@pytest.mark.parametrize(
    "penalty",
    [
        lambda w: w.square().sum(),
        lambda w: w.T.sum(),
        lambda w: torch.stack([w, w]).sum(),
        lambda w: torch.stack(torch._foreach_norm([w])).sum(),
        lambda w: torch.add(input=w, other=1).sum(),
    ],
)
def test_a_parameter_in_the_loss_is_refused(penalty: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 3))
    with pytest.raises(RuntimeError, match="weight_decay"):
        LossModel(lambda o: F.cross_entropy(o, INDEX) + penalty(weight), LOGITS, 1.0, [weight])


def test_a_loss_that_cannot_be_differentiated_twice() -> None:
    logits = torch.randn(5, 2, 4)

    def loss(o: Tensor) -> Tensor:
        return F.ctc_loss(
            o.log_softmax(2), torch.ones(2, 2, dtype=torch.long), torch.tensor([5, 5]), torch.tensor([2, 2])
        )

    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        LossModel(loss, logits, 1.0, []).cotangent(logits)


def test_a_loss_that_writes_to_the_outputs() -> None:
    with pytest.raises(RuntimeError, match="out-of-place"):
        LossModel(lambda o: F.cross_entropy(o.mul_(2), INDEX), LOGITS, 1.0, [])


def test_an_empty_batch_with_probabilities_is_skipped() -> None:
    net = nn.Linear(3, 4)
    optimizer = CurveBall(net.parameters(), backend="torch")
    loss, _ = optimizer.step(lambda: net(torch.ones(0, 3)), lambda out: F.cross_entropy(out, torch.ones(0, 4)))
    assert loss.isnan() and optimizer.stats()["skipped_steps"] == 1


NEVER_NEGATIVE: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "one": (lambda o: F.mse_loss(o, TARGET), True),
    "sum": (lambda o: F.cross_entropy(o, INDEX) + 2 * F.mse_loss(o, TARGET), True),
    "sum of those that are not sure": (
        lambda o: F.binary_cross_entropy_with_logits(o, LABELS) + F.cross_entropy(o, PROBABILITIES), True,
    ),
    "one of the terms may be": (
        lambda o: F.mse_loss(o, TARGET) + F.binary_cross_entropy_with_logits(o, 2 * LABELS - 1), False,
    ),
    "a constant above zero": (lambda o: F.mse_loss(o, TARGET) + 1, True),
    "a constant below zero": (lambda o: F.mse_loss(o, TARGET) - 1, False),
    "log-probabilities of densities": (lambda o: F.mse_loss(o, TARGET) + F.nll_loss(o, INDEX), False),
    "another": (lambda o: F.huber_loss(o, TARGET), False),
}  # fmt: skip


@pytest.mark.parametrize("name", NEVER_NEGATIVE)
def test_which_sums_are_never_negative(name: str) -> None:
    loss_fn, expected = NEVER_NEGATIVE[name]
    found = losses.loss_gradient(loss_fn, LOGITS.detach().clone().requires_grad_(), 1.0, [])
    assert bool(found.is_never_negative) == expected
    (gradient,) = torch.autograd.grad(loss_fn(leaf := LOGITS.detach().clone().requires_grad_()), leaf)
    assert torch.equal(found.cotangent, gradient)
