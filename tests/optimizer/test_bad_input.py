"""Every bad input gets a clear error, and changes nothing."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall, build_info

NAN, INF = float("nan"), float("inf")


def parameter(*shape: int, **options: Any) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape, **options))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (dict(lr=-0.1), ValueError, "lr must be finite and at least 0"),
        (dict(lr=NAN), ValueError, "lr must be finite"),
        (dict(lr="fast"), TypeError, "lr must be a number"),
        (dict(lr=torch.tensor([0.1, 0.2])), ValueError, "one element"),
        (dict(lr=torch.tensor(1)), ValueError, "floating-point"),
        (dict(lr=torch.tensor(-1.0)), ValueError, "lr must be finite and at least 0"),
        (dict(beta=-1.0), ValueError, "beta.*None to solve for it"),
        (dict(beta=INF), ValueError, "beta"),
        (dict(rho=1.5), ValueError, "rho.*between 0.0 and 1.0"),
        (dict(rho=NAN), ValueError, "rho"),
        (dict(rho=True), TypeError, "rho must be a number"),
        (dict(lambd=-1.0), ValueError, "lambd"),
        (dict(lambd=0.0), ValueError, "auto_lambda is on"),
        (dict(lambd=2.0, lambda_max=1.0), ValueError, "lambda_max"),
        (dict(lambda_factor=0.0), ValueError, "lambda_factor"),
        (dict(lambda_factor=1.1), ValueError, "lambda_factor"),
        (dict(lambda_low=2.0), ValueError, "lambda_high"),
        (dict(lambda_low=NAN), ValueError, "lambda_low"),
        (dict(lambda_interval=0), ValueError, "lambda_interval"),
        (dict(lambda_interval=2.5), ValueError, "whole number"),
        (dict(lambda_min=0.0), ValueError, "lambda_min"),
        (dict(lambda_min=2.0, lambda_max=1.0), ValueError, "lambda_max"),
        (dict(weight_decay=-1e-3), ValueError, "weight_decay"),
        (dict(weight_decay=NAN), ValueError, "weight_decay"),
        (dict(curvature="backward"), ValueError, "'forward'"),
        (dict(backend="gpu"), ValueError, "'triton'"),
        (dict(backend="cuda"), RuntimeError, 'backend="auto"'),
        (dict(backend="triton"), RuntimeError, "triton"),
    ],
    ids=str,
)
def test_hyper_parameters(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        CurveBall([parameter(2)], **settings)


def test_values_at_the_edge_are_fine() -> None:
    CurveBall([parameter(2)], lr=0, rho=0.0, beta=0, lambd=0, auto_lambda=False, weight_decay=0)
    CurveBall([parameter(2)], rho=1, lambd=1e-6, lambda_factor=1.0, lambda_interval=1)


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        (lambda: [torch.ones(2, 2, requires_grad=True) * 2], ValueError, "non-leaf"),
        (lambda: [nn.Parameter(torch.eye(2).to_sparse())], ValueError, "dense"),
        (lambda: [parameter(2, dtype=torch.complex64)], TypeError, "view_as_real"),
        (lambda: [torch.ones(2, dtype=torch.int64)], TypeError, "torch.int64"),
        (lambda: [parameter(2), parameter(2, device="meta")], ValueError, "several devices.*cpu.*meta"),
        (list, ValueError, "empty"),
        (lambda: parameter(2), TypeError, "iterable"),
        (lambda: [dict(params=[parameter(2)], lr=-1.0)], ValueError, "lr"),
        (lambda: [dict(params=[parameter(2)], rho=0.5)], ValueError, "rho belongs to the whole optimizer"),
        (lambda: [dict(params=[parameter(2)], weight_decay="much")], TypeError, "weight_decay"),
    ],
)
def test_parameters(params: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        CurveBall(params())


def test_a_refused_group_is_not_kept() -> None:
    optimizer = CurveBall([parameter(2)])
    with pytest.raises(TypeError):
        optimizer.add_param_group(dict(params=[torch.ones(2, dtype=torch.int64)]))
    assert len(optimizer.param_groups) == 1


class Setting:
    """A net in the middle of training, and a way to see that nothing about it has changed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.x, self.y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
        self.optimizer = CurveBall(self.net.parameters())
        self.optimizer.step(lambda: self.net(self.x), self.loss)

    def loss(self, out: Tensor) -> Tensor:
        return F.cross_entropy(out, self.y)

    def picture(self) -> list[Any]:
        z = [self.optimizer.state[p]["z"] for p in self.net.parameters()]
        shared = self.optimizer._shared
        tensors = [*self.net.state_dict().values(), *z, shared["scalars"], torch.get_rng_state()]
        return copy.deepcopy([tensors, shared["step"], self.optimizer.param_groups])


def assert_same(a: list[Any], b: list[Any]) -> None:
    for x, y in zip(a[0], b[0], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    assert a[1] == b[1] and [g["lr"] for g in a[2]] == [g["lr"] for g in b[2]]


STEPS: dict[str, tuple[Callable[[Setting], Any], type[Exception], str]] = {
    "closure": (lambda s: s.optimizer.step(lambda: s.loss(s.net(s.x))), TypeError, r"leave out backward\(\)"),
    "closure that calls backward": (
        lambda s: s.optimizer.step(lambda: s.loss(s.net(s.x)).backward()),
        TypeError,
        r"optimizer\.step\(lambda: \(model\(x\), lambda outputs: ",
    ),
    "closure of outputs and loss": (
        lambda s: s.optimizer.step(lambda: (out := s.net(s.x), s.loss(out))),
        TypeError,
        "the loss as a function of them",
    ),
    "closure by name": (lambda s: s.optimizer.step(closure=lambda: 1.0), TypeError, r"leave out backward\(\)"),
    "closure and another": (
        lambda s: s.optimizer.step(lambda: s.net(s.x), closure=lambda: (s.net(s.x), s.loss)),
        TypeError,
        "differentiates the model itself",
    ),
    "loss alone": (lambda s: s.optimizer.step(loss_fn=s.loss), TypeError, "differentiates the model itself"),
    "loss": (lambda s: s.optimizer.step(torch.ones(())), TypeError, "lambda: model"),
    "nothing": (lambda s: s.optimizer.step(), TypeError, "lambda: model"),
    "independent": (
        lambda s: s.optimizer.step(lambda: s.x @ torch.ones(3, 2), s.loss),
        RuntimeError,
        "does not depend",
    ),
    "detached": (lambda s: s.optimizer.step(lambda: s.net(s.x).detach(), s.loss), RuntimeError, "does not depend|lost"),
    "other model": (
        lambda s: s.optimizer.step(lambda: nn.Linear(3, 2)(s.x), s.loss),
        RuntimeError,
        "does not depend",
    ),
    "under no_grad": (lambda s: s.optimizer.step(torch.no_grad()(lambda: s.net(s.x)), s.loss), RuntimeError, "no_grad"),
    "numbers": (lambda s: s.optimizer.step(lambda: ("x", 1), s.loss), TypeError, "floating-point tensor.*tuple"),
    "integer output": (lambda s: s.optimizer.step(lambda: s.net(s.x).argmax(1), s.loss), TypeError, "int64"),
    "complex output": (
        lambda s: s.optimizer.step(lambda: torch.complex(s.net(s.x), s.net(s.x)), s.loss),
        TypeError,
        "complex",
    ),
    "vector loss": (
        lambda s: s.optimizer.step(lambda: s.net(s.x), lambda o: F.cross_entropy(o, s.y, reduction="none")),
        RuntimeError,
        r"scalar.*\(6,\)",
    ),
    "number loss": (lambda s: s.optimizer.step(lambda: s.net(s.x), lambda o: s.loss(o).item()), TypeError, "float"),
    "constant loss": (
        lambda s: s.optimizer.step(lambda: s.net(s.x), lambda o: torch.ones(())),
        RuntimeError,
        "does not depend on the outputs",
    ),
    "wrong target": (
        lambda s: s.optimizer.step(lambda: s.net(s.x), lambda o: F.cross_entropy(o, s.y[:3])),
        ValueError,
        "batch_size",
    ),
    "model error": (lambda s: s.optimizer.step(lambda: s.net(s.x.T), s.loss), RuntimeError, "shape"),
}


@pytest.mark.parametrize("curvature", ["auto", "double_backward"])
@pytest.mark.parametrize("name", list(STEPS))
def test_steps(name: str, curvature: str) -> None:
    action, error, words = STEPS[name]
    setting = Setting()
    setting.optimizer.defaults["curvature"] = curvature
    before = setting.picture()
    with pytest.raises(error, match=words):
        action(setting)
    assert_same(before, setting.picture())
    setting.optimizer.step(lambda: setting.net(setting.x), setting.loss)


def test_an_error_after_the_model_ran_puts_its_buffers_back() -> None:
    setting = Setting()
    before = setting.picture()

    def fails(out: Tensor) -> Tensor:
        raise KeyError("target not loaded")

    with pytest.raises(KeyError):
        setting.optimizer.step(lambda: setting.net(setting.x), fails)
    assert_same(before, setting.picture())


def test_sparse_gradients() -> None:
    net = nn.Embedding(5, 3, sparse=True)
    with pytest.raises(RuntimeError, match="sparse=False"):
        CurveBall(net.parameters()).step(lambda: net(torch.tensor([1, 2])), lambda out: out.square().mean())


def test_nothing_requires_a_gradient() -> None:
    net = nn.Linear(2, 2)
    optimizer = CurveBall(net.parameters())
    net.requires_grad_(False)
    with pytest.raises(RuntimeError, match="requires a gradient"):
        optimizer.step(lambda: net(torch.ones(1, 2)), lambda out: out.mean())


def checkpoint_of(net: nn.Module, optimizer_type: Any = CurveBall, **options: Any) -> dict[str, Any]:
    optimizer = optimizer_type(net.parameters(), **options)
    if optimizer_type is CurveBall:
        optimizer.step(lambda: net(torch.ones(2, 3)), lambda out: out.square().mean())
    else:
        net(torch.ones(2, 3)).square().mean().backward()
        optimizer.step()
    result: dict[str, Any] = optimizer.state_dict()
    return result


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: checkpoint_of(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))), r"\(5, 3\).*\(4, 3\)"),
        (lambda: checkpoint_of(nn.Linear(3, 4)), "parameters"),
        (lambda: checkpoint_of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.optim.Adam), "another optimizer"),
        (
            lambda: torch.optim.Adam(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).parameters()).state_dict(),
            "another optimizer",
        ),
        (lambda: {"net": 1}, "state_dict"),
        (
            lambda: {
                "state": {"curveball": {"scalars": torch.zeros(3)}},
                "param_groups": [{"params": [0, 1, 2, 3]}],
            },
            "scalars",
        ),
    ],
)
def test_checkpoints_of_something_else(make: Callable[[], dict[str, Any]], words: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = CurveBall(net.parameters())
    optimizer.step(lambda: net(torch.ones(2, 3)), lambda out: out.square().mean())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(make())
    after = optimizer.state_dict()
    for key, value in before["state"].items():
        for name, entry in value.items():
            if isinstance(entry, Tensor):
                torch.testing.assert_close(after["state"][key][name], entry, rtol=0, atol=0, equal_nan=True)


def run_without_native(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` where the native library can't be imported."""
    hide = "import sys; sys.modules['curveball_fused._C'] = None\n"
    return subprocess.run(
        [sys.executable, "-c", hide + code], capture_output=True, text=True, env=os.environ | environment
    )


def test_works_without_the_native_library_and_says_so() -> None:
    code = """
import torch, curveball_fused
net = torch.nn.Linear(3, 2)
optimizer = curveball_fused.CurveBall(net.parameters())
first, _ = optimizer.step(lambda: net(torch.eye(3)), lambda out: (out - 1).square().mean())
last, _ = optimizer.step(lambda: net(torch.eye(3)), lambda out: (out - 1).square().mean())
assert last < first
info = curveball_fused.build_info()
assert info["backend"] == "torch" and "not loaded" in info["cpu library"] and "compiler" in info["to get cpu"], info
try:
    curveball_fused.CurveBall(net.parameters(), backend="cpu")
except RuntimeError as error:
    assert "not loaded" in str(error), error
else:
    raise AssertionError("a named backend that is not there was accepted")
"""
    result = run_without_native(code, CURVEBALL_REQUIRE_NATIVE="0")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_native_can_be_required() -> None:
    result = run_without_native("import curveball_fused", CURVEBALL_REQUIRE_NATIVE="1")
    assert result.returncode != 0 and "CURVEBALL_REQUIRE_NATIVE=1" in result.stderr


@pytest.mark.slow
def test_command_line_tells_what_was_chosen() -> None:
    result = subprocess.run([sys.executable, "-m", "curveball_fused"], capture_output=True, text=True, check=True)
    for key, value in build_info().items():
        assert key in result.stdout and value in result.stdout


@pytest.mark.parametrize("name", ["auto_lambda", "maximize", "compile", "debug"])
def test_a_switch_must_be_a_bool(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be True or False; got 'no'"):
        CurveBall([torch.nn.Parameter(torch.ones(2))], **{name: "no"})
