"""CurveBall as a citizen of torch.optim."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curveball_fused import CurveBall, ops
from curveball_fused.backends.scalars import LAMBD
from tests.helpers import nets
from tests.helpers.training import BACKENDS, SETTINGS, advance, assert_equal, everything, small


def test_learns_without_hyper_parameters() -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters())
    first, _ = advance(optimizer, net, x, y)
    last, _ = advance(optimizer, net, x, y, 60)
    assert last < 0.3 * first
    assert optimizer.stats()["skipped_steps"] == 0 and optimizer.stats()["safe_steps"] == 0


def test_returns_detached_loss_and_outputs_of_the_old_weights() -> None:
    net, x, y = small()
    net.eval()
    with torch.no_grad():
        expected = net(x)
    loss, outputs = advance(CurveBall(net.parameters()), net, x, y)
    assert loss.grad_fn is None and outputs.grad_fn is None and not outputs.requires_grad
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(loss, F.cross_entropy(expected, y))
    assert all(p.grad is None for p in net.parameters())


def test_scheduler_and_hooks_and_zero_grad() -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    for _ in range(4):
        optimizer.zero_grad()
        advance(optimizer, net, x, y)
        scheduler.step()
    assert calls == ["before", "after"] * 4
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)
    before = [p.clone() for p in net.parameters()]
    advance(optimizer, net, x, y)
    assert_equal(before, list(net.parameters()))


def test_one_cycle_and_plateau() -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters())
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=5, cycle_momentum=False)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    for _ in range(4):
        loss, _ = advance(optimizer, net, x, y)
        cycle.step()
        plateau.step(loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensor_lr_is_the_number(backend: str) -> None:
    results = []
    for lr in (0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
        net, x, y = small()
        optimizer = CurveBall(net.parameters(), lr=lr, backend=backend)
        advance(optimizer, net, x, y, 4)
        results.append(everything(optimizer, net))
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


def test_groups_with_unequal_tensor_lr() -> None:
    results = []
    for a, b in ((0.5, 0.25), (torch.tensor(0.5), torch.tensor(0.25))):
        net, x, y = small()
        groups = [
            dict(params=net[0].parameters(), lr=a),
            dict(params=[*net[1].parameters(), *net[4].parameters()], lr=b),
        ]
        optimizer = CurveBall(groups)
        advance(optimizer, net, x, y, 4)
        results.append(everything(optimizer, net))
    assert_equal(*results)


def test_one_group_or_two_is_the_same_step() -> None:
    net, x, y = small()
    twin = copy.deepcopy(net)
    one = CurveBall(net.parameters(), **SETTINGS)
    two = CurveBall([dict(params=twin[0].parameters())], **SETTINGS)
    two.add_param_group(dict(params=[*twin[1].parameters(), *twin[4].parameters()]))
    for step in range(6):
        for optimizer, model in ((one, net), (two, twin)):
            torch.manual_seed(step)
            advance(optimizer, model, x, y)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_group_added_and_parameters_frozen_in_the_middle() -> None:
    """z·z is that of the parameters that take part, checked through β and ρ of a fresh optimizer with the same z."""
    net, x, y = small()
    optimizer = CurveBall(net[0].parameters(), **SETTINGS)
    advance(optimizer, net, x, y, 2)
    optimizer.add_param_group(dict(params=net[4].parameters(), lr=0.3))
    advance(optimizer, net, x, y, 2)
    for p in net[0].parameters():
        p.requires_grad_(False)
    frozen = [p.clone() for p in net[0].parameters()]
    fresh_net = copy.deepcopy(net)
    fresh = CurveBall(fresh_net[4].parameters(), **(SETTINGS | dict(lr=0.3)))
    torch.manual_seed(1)
    advance(fresh, fresh_net, x, y)
    fresh_net.load_state_dict(net.state_dict())
    for p, q in zip(fresh_net[4].parameters(), net[4].parameters(), strict=True):
        fresh.state[p]["z"].copy_(optimizer.state[q]["z"])
    fresh._shared["active"] = -1  # of none, so that z·z is summed anew
    fresh._shared["scalars"][LAMBD] = optimizer.stats()["lambd"]
    for o, model in ((optimizer, net), (fresh, fresh_net)):
        torch.manual_seed(2)
        advance(o, model, x, y)
    for name in ("beta", "rho", "predicted_change"):
        torch.testing.assert_close(optimizer.stats()[name], fresh.stats()[name], rtol=1e-6, atol=1e-9)
    assert_equal(frozen, list(net[0].parameters()))


def test_maximize_is_minimising_the_negative() -> None:
    results = []
    for sign, maximize in ((1, False), (-1, True)):
        net, x, y = small()
        optimizer = CurveBall(net.parameters(), maximize=maximize, **SETTINGS)
        for _ in range(5):
            optimizer.step(lambda: net(x), lambda out: sign * (F.cross_entropy(out, y) + out.square().mean()))
        stats = optimizer.stats()
        results.append(
            [*net.state_dict().values(), stats["beta"], stats["lambd"], stats["ratio"], sign * stats["loss"]]
        )
    assert_equal(*results)


def test_stats_before_the_first_step() -> None:
    stats = CurveBall(nn.Linear(2, 2).parameters(), lambd=3.0).stats()
    assert set(stats) == {
        "loss", "beta", "rho", "lambd", "predicted_change", "ratio", "skipped_steps", "safe_steps",
        "mismatched_steps", "adjoint_error",
    }  # fmt: skip
    assert stats["lambd"] == 3 and all(v.shape == () and v.dtype == torch.float64 for v in stats.values())


@pytest.mark.parametrize("name", list(nets.NETS))
def test_float32_follows_float64(name: str) -> None:
    losses = []
    for dtype in (torch.float64, torch.float32):
        net, x = nets.make(name)
        net, x = net.to(dtype), x.to(dtype) if x.is_floating_point() else x
        y = torch.arange(len(x)) % 3
        torch.manual_seed(0)
        optimizer = CurveBall(net.parameters())
        net.eval() if name == "dropout" else net.train()
        losses.append(torch.stack([advance(optimizer, net, x, y)[0].double() for _ in range(8)]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)


def test_channels_last_model() -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        net, x = nets.make("convolution + batch norm")
        net, x = net.to(memory_format=memory_format), x.to(memory_format=memory_format)
        optimizer = CurveBall(net.parameters(), weight_decay=0.1)
        advance(optimizer, net, x, torch.arange(6) % 3, 5)
        results.append(list(net.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_same_result_from_any_backend_and_twice() -> None:
    results = []
    for backend in [*BACKENDS, BACKENDS[-1]]:
        net, x, y = small()
        optimizer = CurveBall(net.parameters(), backend=backend, **SETTINGS)
        torch.manual_seed(4)
        advance(optimizer, net, x, y, 10)
        results.append([t.detach().clone() for t in net.parameters()])
    assert_equal(results[-1], results[-2])
    for a, b in zip(results[0], results[-1], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("curvature", ["forward", "double_backward"])
def test_outputs_that_are_parameters_are_those_before_the_step(curvature: str) -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    _, outputs = CurveBall([w], curvature=curvature).step(lambda: w.view(2, 1), lambda out: out.square().sum())
    assert outputs.flatten().tolist() == [1, 2] and w.tolist() != [1, 2]


def test_update_outside_no_grad_and_stale_graphs() -> None:
    w = nn.Parameter(torch.ones(3))
    old = (w * w).sum()
    z_dot_z = ops.update_([w], [torch.ones(3)], [torch.ones(3)], torch.tensor([0.1, 0.9, 0.0]).double(), lr=1.0)
    assert z_dot_z.grad_fn is None and w.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


def test_a_group_may_be_empty() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = CurveBall([dict(params=[]), dict(params=[w], lr=0.5)])
    optimizer.step(lambda: w * 1.0, lambda out: out.square().sum())
    assert optimizer.stats()["loss"] == 2 and w[0] < 1


@pytest.mark.parametrize("curvature", ["linearize", "forward", "double_backward"])
def test_the_predictions_may_be_a_parameter(curvature: str) -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = CurveBall([w], curvature=curvature)
    _, outputs = optimizer.step(lambda: w, lambda out: out.square().sum())
    assert w[0] < 1 and outputs.tolist() == [1, 1]
