"""What people do with `.grad` before a step: nothing reads it, and a word says so, once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from tests.helpers.training import advance, assert_equal, everything, small

WORD = "neither reads nor clears: backward\\(\\), clip_grad_norm_"


def backward(net: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(net(x), y).backward()


def clipped(net: nn.Module, x: Tensor, y: Tensor) -> None:
    backward(net, x, y)
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)


def summed_up(net: nn.Module, x: Tensor, y: Tensor) -> None:
    for part, classes in zip(x.split(2), y.split(2), strict=True):
        backward(net, part, classes)


@pytest.mark.parametrize("before", [backward, clipped, summed_up])
def test_a_word_is_said_once_and_the_steps_are_the_same(before: Callable[..., None]) -> None:
    net, x, y = small()
    net.eval()  # so that the runs of `before` move nothing
    twin = copy.deepcopy(net)
    optimizer, plain = CurveBall(net.parameters()), CurveBall(twin.parameters())
    with pytest.warns(UserWarning, match=WORD) as caught:
        for _ in range(3):
            before(net, x, y)
            advance(optimizer, net, x, y)
    assert len([w for w in caught if "neither reads" in str(w.message)]) == 1
    assert all(p.grad is not None for p in net.parameters())
    advance(plain, twin, x, y, 3)
    assert_equal(everything(optimizer, net), everything(plain, twin))


def nothing(net: nn.Module, x: Tensor, y: Tensor) -> None:
    pass


def cleared(net: nn.Module, x: Tensor, y: Tensor) -> None:
    backward(net, x, y)
    net.zero_grad()


def of_another_optimizer(net: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(net(x), y).backward(inputs=[*net[4].parameters()])


def frozen_since(net: nn.Module, x: Tensor, y: Tensor) -> None:
    backward(net, x, y)
    net[1:].zero_grad()
    net[0].requires_grad_(False)


@pytest.mark.parametrize("before", [nothing, cleared, of_another_optimizer, frozen_since])
def test_no_word_without_a_gradient_that_could_be_meant(before: Callable[..., None]) -> None:
    net, x, y = small()
    optimizer = CurveBall(net[:4].parameters())
    before(net, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advance(optimizer, net, x, y, 2)


@pytest.mark.parametrize("preconditioner", [None, "kronecker"])
@pytest.mark.parametrize("weight", [1.0, 100.0])
def test_a_bound_on_what_a_batch_weighs(weight: float, preconditioner: str | None) -> None:
    """Steps are those of a batch with a smaller weight, or, below the bound, with the same one."""

    def bounded(loss: Tensor) -> Tensor:
        return weight * loss / (weight * loss.detach() / 3).clamp(min=1)

    def by_number(loss: Tensor) -> Tensor:
        return min(weight, 3 / float(loss.detach())) * loss

    ends = []
    for of in (bounded, by_number):
        net, x, y = small(dtype=torch.float64)
        optimizer = CurveBall(net.parameters(), preconditioner=preconditioner)
        for _ in range(3):
            loss, _ = optimizer.step(lambda: net(x), lambda outputs: of(F.cross_entropy(outputs, y)))
            assert float(loss) <= 3 * (1 + 1e-9)
        ends.append([p.detach() for p in net[4].parameters()])  # before batch norm a bias has noise for a gradient
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-9)


def test_a_gradient_is_clipped_by_a_hook_on_its_parameter() -> None:
    """The way that does something, in the steps between two solves and in those that solve."""
    net, x, y = small()
    seen: list[float] = []

    def clip(g: Tensor) -> Tensor:
        limit = 0.5 * float(g.norm())
        seen.append(limit)
        return g * 0.5

    hook = net[0].weight.register_hook(clip)
    twin = copy.deepcopy(net)
    net_steps, twin_steps = (
        CurveBall(net.parameters(), rho=0.0, beta=0.1),
        CurveBall(twin.parameters(), rho=0.0, beta=0.1),
    )
    before = net[0].weight.detach().clone()
    for optimizer, model in ((net_steps, net), (twin_steps, twin)):
        torch.manual_seed(3)
        advance(optimizer, model, x, y)
    hook.remove()
    assert len(seen) == 1
    halved, whole = net[0].weight - before, twin[0].weight - before
    torch.testing.assert_close(halved.detach(), 0.5 * whole.detach())
