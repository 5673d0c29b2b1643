"""A batch in parts whose loss has no curvature in the outputs: what stands in its place is that of the whole."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall, user_warnings
from tests.optimizer.test_parts import OPTIONS, Loss, as_one, batch, cross_entropy, fourth_power, parts_of


def absolute(out: Tensor, y: Tensor) -> Tensor:
    return (out - F.one_hot(y, out.shape[1])).abs().mean()


def absolute_of_a_few(out: Tensor, y: Tensor) -> Tensor:
    """Without a curvature in the last part, with one in the others."""
    return fourth_power(out, y) if len(out) < 5 else absolute(out, y)


def closed_form_of_a_few(out: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(out, F.one_hot(y, out.shape[1]).to(out)) if len(out) < 5 else absolute(out, y)


@pytest.mark.parametrize("loss", [absolute, absolute_of_a_few, closed_form_of_a_few])
@pytest.mark.parametrize("weights", [float, lambda n: torch.tensor(float(n))])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_curvature_is_missing_where_the_whole_has_none(options: str, weights: Any, loss: Loss) -> None:
    """What stands in its place is made of the gradient and the size of the whole."""
    found = []
    for split in (True, False):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        optimizer = CurveBall(net.parameters(), **OPTIONS[options])
        losses = []
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for step in range(10):
                cuts = [4, 2, 5]
                given = (parts_of if split else as_one)(net, *batch(step), cuts, loss)
                more = dict(weights=[weights(n) for n in cuts]) if split else {}
                losses.append(optimizer.step(given, **more)[0] if split else optimizer.step(*given)[0])
        places = [w.filename for w in told if "no curvature" in str(w.message)]
        assert places == ([__file__] if loss is absolute else [])  # it names the line that calls
        found.append([*net.state_dict().values(), *losses, *optimizer.stats().values()])
        user_warnings.announced.clear()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-7, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("kind", ["no rows", "inputs of zero", "no targets"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_part_with_a_closed_form_may_be_without_curvature_too(options: str, kind: str) -> None:
    found = []
    for split in (True, False):
        torch.manual_seed(3)
        net = nn.Linear(5, 3, bias=False).double()
        optimizer = CurveBall(net.parameters(), **OPTIONS[options])
        for step in range(8):
            x, y = batch(step)
            other = {"no rows": x[:0], "inputs of zero": torch.zeros_like(x), "no targets": x}[kind]
            ignored = torch.full((len(other),), -100)

            def beside(out: Tensor, kind: str = kind, ignored: Tensor = ignored) -> Tensor:
                if kind == "no targets":
                    return F.cross_entropy(out, ignored, reduction="sum")
                return F.mse_loss(out, torch.ones_like(out), reduction="sum")

            if split:
                parts = [
                    (lambda x=x, net=net: net(x), lambda out, y=y: absolute(out, y)),
                    (lambda x=other, net=net: net(x), beside),
                ]
                optimizer.step(parts, weights=[1.0, 1.0])
            else:
                optimizer.step(
                    lambda x=x, other=other, net=net: torch.cat((net(x), net(other))),
                    lambda out, y=y, beside=beside: (absolute(out[: len(y)], y) + beside(out[len(y) :])) / 2,
                )
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss", [cross_entropy, absolute])
def test_numbers_among_the_parameters_keep_their_dtype(loss: Loss) -> None:
    """Where a 0-dim weight is in double precision, its product with a 0-dim gradient is."""
    found = []
    for weights in ([4.0, 7.0], [torch.tensor(4.0), torch.tensor(7.0)]):
        torch.manual_seed(0)
        net, scale = nn.Linear(5, 3), nn.Parameter(torch.tensor(1.5))
        optimizer = CurveBall([*net.parameters(), scale], lambd=0.5)
        for step in range(3):

            def model(x: Tensor, net: nn.Module = net, scale: Tensor = scale) -> Tensor:
                return scale * net(x)

            optimizer.step(parts_of(model, *batch(step, torch.float32), [4, 7], loss), weights=weights)
        found.append([scale, *net.parameters()])
        assert scale.dtype == optimizer.state[scale]["z"].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_losses_that_the_model_returns(options: str) -> None:
    found = []
    for split in (True, False):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        optimizer = CurveBall(net.parameters(), **OPTIONS[options])
        for step in range(10):
            (x, y), cuts = batch(step), [4, 7]
            models = [lambda x=x_i, y=y_i: F.cross_entropy(net(x), y) for x_i, y_i in zip(x.split(cuts), y.split(cuts))]
            if split:
                optimizer.step([(model, lambda out: out) for model in models], weights=cuts)
            else:
                shares = torch.tensor(cuts).double() / 11
                optimizer.step(lambda models=models: torch.stack([m() for m in models]), lambda out: shares @ out)
        found.append([*net.state_dict().values(), *optimizer.stats().values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-7, atol=1e-9, equal_nan=True)
