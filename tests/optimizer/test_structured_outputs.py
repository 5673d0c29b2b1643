"""Outputs of any structure: the steps are those of one tensor with the same numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall

OPTIONS: dict[str, dict[str, Any]] = {
    "linearize": dict(curvature="linearize", lambd=0.5),
    "linearize_operators": dict(curvature="linearize_operators", lambd=0.5),
    "forward": dict(curvature="forward", lambd=0.5),
    "double_backward": dict(curvature="double_backward", lambd=0.5),
    "kronecker": dict(preconditioner="kronecker", solve_interval=3, lr=0.7),
}


class Pair(NamedTuple):
    logits: Tensor
    others: list[Any]


@dataclass
class Output:
    logits: Tensor
    mask: Tensor
    value: Tensor | None = None
    name: str = field(default="", init=False)


class Net(nn.Module):
    """Logits, a value, and a mask that depends on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2))
        self.classes, self.value = nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.body(x)
        return self.classes(h), self.value(h), (x[:, :1] > 0).to(x.dtype)


Form = Callable[[Tensor, Tensor, Tensor], Any]
FORMS: dict[str, tuple[Form, Callable[[Any], tuple[Tensor, Tensor, Tensor]]]] = {
    "tuple": (lambda c, v, m: (c, v, m), lambda out: out),
    "list": (lambda c, v, m: [m, "text", c, None, v], lambda out: (out[2], out[4], out[0])),
    "dict": (lambda c, v, m: {"v": v, "m": m, "c": c}, lambda out: (out["c"], out["v"], out["m"])),
    "ordered": (lambda c, v, m: OrderedDict(c=c, v=v, m=m), lambda out: (out["c"], out["v"], out["m"])),
    "dataclass": (lambda c, v, m: Output(c, m, v), lambda out: (out.logits, out.value, out.mask)),
    "named": (lambda c, v, m: Pair(c, [{"v": v}, m]), lambda out: (out.logits, out.others[0]["v"], out.others[1])),
    "tensor": (lambda c, v, m: torch.cat([c, v, m], 1), lambda out: (out[:, :3], out[:, 3:4], out[:, 4:].detach())),
}


def trained(form: str, options: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Any]]:
    torch.manual_seed(0)
    net, (pack, unpack) = Net().to(dtype), FORMS[form]
    optimizer, returned = CurveBall(net.parameters(), **options), []
    for _ in range(7):
        x, y = torch.randn(16, 5, dtype=dtype), torch.randint(3, (16,))

        def loss_fn(out: Any, y: Tensor = y) -> Tensor:
            logits, value, mask = unpack(out)
            return F.cross_entropy(logits, y) + (mask * (value - 1).square()).mean()

        loss, outputs = optimizer.step(lambda x=x: pack(*net(x)), loss_fn)
        returned.append((loss, outputs))
    assert optimizer.stats()["skipped_steps"] == 0
    return torch.cat([t.flatten().double() for t in net.state_dict().values()]), returned


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", [form for form in FORMS if form != "tensor"])
def test_steps_are_those_of_one_tensor(form: str, options: str) -> None:
    weights, returned = trained(form, OPTIONS[options])
    expected, together = trained("tensor", OPTIONS[options])
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-11)
    unpack = FORMS[form][1]
    for (loss, outputs), (loss_too, one) in zip(returned, together, strict=True):
        torch.testing.assert_close(loss, loss_too, rtol=1e-9, atol=1e-12)
        parts = unpack(outputs)
        torch.testing.assert_close(torch.cat(parts, 1), one, rtol=1e-9, atol=1e-11)
        assert not any(t.requires_grad for t in parts) and type(outputs) is type(FORMS[form][0](*parts))


@pytest.mark.parametrize("options", OPTIONS)
def test_one_tensor_in_a_structure_goes_on_as_it_is(options: str) -> None:
    """With the closed form of its loss, bit for bit."""
    found = []
    for wrap, read in ((lambda t: {"logits": t, "n": 3}, lambda out: out["logits"]), (lambda t: t, lambda out: out)):
        torch.manual_seed(0)
        net, x, y = Net(), torch.randn(16, 5), torch.randint(3, (16,))
        optimizer = CurveBall(net.parameters(), **OPTIONS[options])
        for _ in range(5):
            _, outputs = optimizer.step(
                lambda net=net, x=x, wrap=wrap: wrap(net(x)[0]),
                lambda out, y=y, read=read: F.cross_entropy(read(out), y),
            )
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        assert read(outputs).shape == (16, 3)
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "linearize_operators"])
def test_parts_of_several_dtypes(options: str) -> None:
    """Each is given back in its own; the loss sees half precision in float32."""
    torch.manual_seed(0)
    net, x, seen = Net(), torch.randn(16, 5), []
    optimizer = CurveBall(net.parameters(), **OPTIONS[options])

    def loss_fn(out: dict[str, Tensor]) -> Tensor:
        seen.append([t.dtype for t in out.values()])
        return out["half"].square().mean() + out["wide"].square().mean().float()

    def model_fn() -> dict[str, Tensor]:
        logits, value, _ = net(x)
        return {"half": logits.bfloat16(), "wide": value.double()}

    for _ in range(4):
        _, outputs = optimizer.step(model_fn, loss_fn)
    assert all(dtypes == [torch.float32, torch.float64] for dtypes in seen)
    assert [t.dtype for t in outputs.values()] == [torch.bfloat16, torch.float64]
    assert outputs["half"].shape == (16, 3) and optimizer.stats()["skipped_steps"] == 0


@pytest.mark.parametrize("options", OPTIONS)
def test_parameters_of_another_optimizer_stay_constant(options: str) -> None:
    found = []
    for form in ("tuple", "tensor"):
        torch.manual_seed(0)
        net, (pack, unpack) = Net().double().eval(), FORMS[form]
        x = torch.randn(16, 5, dtype=torch.float64)
        optimizer = CurveBall([*net.body.parameters(), *net.classes.parameters()], **OPTIONS[options])
        for _ in range(4):
            optimizer.step(
                lambda net=net, pack=pack, x=x: pack(*net(x)),
                lambda out, unpack=unpack: sum(t.square().mean() for t in unpack(out)),  # type: ignore[arg-type]
            )
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


def test_a_part_of_the_batch_for_the_curvature() -> None:
    torch.manual_seed(0)
    net, x, found = Net().double().eval(), torch.randn(16, 5, dtype=torch.float64), []
    for form in ("dict", "tensor"):
        own = Net().double().eval()
        own.load_state_dict(net.state_dict())
        pack, unpack = FORMS[form]
        optimizer = CurveBall(own.parameters(), average=0.5)
        loss_fn: Any = lambda out, unpack=unpack: sum(t.square().mean() for t in unpack(out)[:2])  # noqa: E731
        for _ in range(4):
            optimizer.step(
                lambda own=own, pack=pack: pack(*own(x)),
                loss_fn,
                curvature_batch=(lambda own=own, pack=pack: pack(*own(x[:5])), loss_fn),
            )
        found.append(torch.cat([p.detach().flatten() for p in own.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


WRONG: dict[str, tuple[Callable[[Net, Tensor], Any], type[Exception], str]] = {
    "nothing": (lambda net, x: {}, TypeError, "returned dict"),
    "no tensors": (lambda net, x: ("a", None), TypeError, "returned tuple"),
    "numbers": (lambda net, x: {"n": torch.ones(3, dtype=torch.long)}, TypeError, "returned dict"),
    "one that cannot be written": (lambda net, x: MappingProxyType({"a": net(x)[0]}), TypeError, "mappingproxy"),
    "constants": (lambda net, x: [x, x + 1], RuntimeError, "does not depend on any parameter"),
    "complex": (lambda net, x: [net(x)[0], net(x)[1] * 1j], TypeError, "real, dense"),
    "sparse": (lambda net, x: [net(x)[0].to_sparse(), net(x)[1]], TypeError, "real, dense"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("preconditioner", [None, "kronecker"])
def test_wrong_structures_are_refused(name: str, preconditioner: str | None) -> None:
    model_fn, error, words = WRONG[name]
    net, x = Net().eval(), torch.randn(4, 5)
    optimizer = CurveBall(net.parameters(), preconditioner=preconditioner)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(error, match=words):
        optimizer.step(lambda: model_fn(net, x), lambda out: torch.zeros(()))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_what_a_part_hides_is_refused() -> None:
    """An object that no structure is known of goes to the loss as it is; what it hides depends on the parameters."""
    net, x = Net().eval(), torch.randn(4, 5)

    class Cache:
        def __init__(self, t: Tensor) -> None:
            self.t = t

    optimizer = CurveBall(net.parameters())
    with pytest.raises(RuntimeError, match="beside the outputs"):
        optimizer.step(
            lambda: (net(x)[0], Cache(net(x)[1])), lambda out: out[0].square().mean() + out[1].t.square().mean()
        )


def test_model_output_of_transformers() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    torch.manual_seed(0)
    net, x, y = Net(), torch.randn(16, 5), torch.randint(3, (16,))
    optimizer = CurveBall(net.parameters(), preconditioner="kronecker")
    for _ in range(5):
        _, returned = optimizer.step(
            lambda: outputs.SequenceClassifierOutput(logits=net(x)[0]), lambda out: F.cross_entropy(out.logits, y)
        )
    assert type(returned) is outputs.SequenceClassifierOutput and torch.equal(returned.logits, returned["logits"])
    assert not returned.logits.requires_grad and returned.loss is None
