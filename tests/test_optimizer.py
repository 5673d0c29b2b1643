"""CurveBall as a citizen of torch.optim."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from curveball_fused import CurveBall, build_info, ops

NATIVE = build_info()["backend"] == "cpu"
BACKENDS = ["torch"] + (["cpu"] if NATIVE else [])
SETTINGS: dict[str, Any] = dict(lr=0.8, lambd=0.5, weight_decay=0.02, lambda_interval=2, lambda_factor=0.9)


def small(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    return net.to(dtype), torch.randn(10, 4).to(dtype), torch.randint(0, 3, (10,))


def advance(optimizer: CurveBall, net: nn.Module, x: Tensor, y: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
    for _ in range(steps):
        loss, outputs = optimizer.step(lambda: net(x), lambda out: F.cross_entropy(out, y))
    return loss, outputs


def everything(optimizer: CurveBall, net: nn.Module) -> list[Tensor]:
    z = [optimizer.state[p]["z"] for p in net.parameters()]
    return [*net.state_dict().values(), *z, *optimizer.stats().values()]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


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
    fresh._states["curveball"]["active"] = []
    fresh._states["curveball"]["scalars"][2] = optimizer.stats()["lambd"]
    for o, model in ((optimizer, net), (fresh, fresh_net)):
        torch.manual_seed(2)
        advance(o, model, x, y)
    for name in ("beta", "rho", "predicted_change"):
        torch.testing.assert_close(optimizer.stats()[name], fresh.stats()[name], rtol=1e-6, atol=1e-9)
    assert_equal(frozen, list(net[0].parameters()))


RESUME = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_optimizer import SETTINGS, CurveBall, advance, everything, small
net, x, y = small(dtype=getattr(torch, sys.argv[3]))
optimizer = CurveBall(net.parameters(), **dict(SETTINGS, lambd=77.0, lr=0.1))
saved = torch.load(sys.argv[2], weights_only=True)
net.load_state_dict(saved["net"])
optimizer.load_state_dict(saved["optimizer"])
torch.set_rng_state(saved["rng"])
advance(optimizer, net, x, y, 5)
torch.save(everything(optimizer, net), sys.argv[2])
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 3])
def test_resumes_bit_for_bit_in_a_new_process(tmp_path: Path, steps: int, dtype: torch.dtype) -> None:
    net, x, y = small(dtype=dtype)
    optimizer = CurveBall(net.parameters(), **SETTINGS)
    if steps:
        advance(optimizer, net, x, y, steps)
    file = tmp_path / "checkpoint.pt"
    torch.save(dict(net=net.state_dict(), optimizer=optimizer.state_dict(), rng=torch.get_rng_state()), file)
    advance(optimizer, net, x, y, 5)
    subprocess.run(
        [sys.executable, "-c", RESUME, str(Path(__file__).parent), str(file), str(dtype).split(".")[1]], check=True
    )
    assert_equal(everything(optimizer, net), torch.load(file, weights_only=True))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_go_the_same_way_and_share_nothing(how: str) -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters(), **SETTINGS)
    advance(optimizer, net, x, y, 3)
    if how == "state_dict":
        twin, _, _ = small(1)
        twin.load_state_dict(net.state_dict())
        other = CurveBall(twin.parameters())
        other.load_state_dict(optimizer.state_dict())
    elif how == "pickle":
        twin, other = pickle.load(io.BytesIO(pickle.dumps((net, optimizer))))
    else:
        twin, other = copy.deepcopy((net, optimizer))
    for o, model in ((optimizer, net), (other, twin)):
        torch.manual_seed(5)
        advance(o, model, x, y, 4)
    assert_equal(everything(optimizer, net), everything(other, twin))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_state_is_float32_also_after_loading(dtype: torch.dtype) -> None:
    net, x, y = small(dtype=dtype)
    optimizer = CurveBall(net.parameters())
    advance(optimizer, net, x, y, 2)
    other = CurveBall(net.parameters())
    other.load_state_dict(optimizer.state_dict())
    for p in net.parameters():
        assert other.state[p]["z"].dtype == torch.float32
        assert torch.equal(other.state[p]["z"], optimizer.state[p]["z"])
    assert other.state[p]["z"].data_ptr() != optimizer.state[p]["z"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_follows_float32(dtype: torch.dtype) -> None:
    """A bfloat16 net learns as the float32 net does, to what rounding the weights allows."""
    losses = []
    for precision in (torch.float32, dtype):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).to(precision)
        x, y = torch.randn(20, 4).to(precision), torch.randint(0, 3, (20,))
        optimizer = CurveBall(net.parameters())
        losses.append([advance(optimizer, net, x, y)[0].float() for _ in range(15)])
    torch.testing.assert_close(torch.stack(losses[1]), torch.stack(losses[0]), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", ["input", "loss", "infinite loss"])
@pytest.mark.parametrize("curvature", ["forward", "double_backward"])
def test_a_step_that_is_not_finite_costs_nothing(backend: str, bad: str, curvature: str) -> None:
    net, x, y = small()
    net[1].track_running_stats = False  # torch itself would put NaN into running statistics
    optimizer = CurveBall(net.parameters(), backend=backend, curvature=curvature, **SETTINGS)
    advance(optimizer, net, x, y, 3)
    twin, other = copy.deepcopy((net, optimizer))
    before = [t.clone() for t in everything(optimizer, net)]
    factor = {"input": 1.0, "loss": float("nan"), "infinite loss": float("inf")}[bad]
    broken = x.clone()
    broken[0, 0] = float("nan") if bad == "input" else 0.0
    optimizer.step(lambda: net(broken), lambda out: F.cross_entropy(out, y) * factor)
    stats = optimizer.stats()
    assert stats["skipped_steps"] == 1 and stats["beta"] == 0 and stats["rho"] == 0
    assert_equal(before[: -len(stats)], everything(optimizer, net)[: -len(stats)])
    other._states["curveball"]["step"] += 1
    for o, model in ((optimizer, net), (other, twin)):
        torch.manual_seed(9)
        advance(o, model, x, y, 4)
    assert_equal(everything(optimizer, net)[: -len(stats)], everything(other, twin)[: -len(stats)])


def test_not_convex_loss_goes_down() -> None:
    """-x² + x⁴ in the outputs, from near its maximum: Gauss-Newton is negative, and plain steps would climb."""
    w = nn.Parameter(torch.tensor([0.05, -0.02], dtype=torch.float64))
    optimizer = CurveBall([w], lambd=0.3)
    losses = [optimizer.step(lambda: w * 1.0, lambda out: (out**4 - out**2).sum())[0].item() for _ in range(60)]
    assert optimizer.stats()["safe_steps"] > 0
    assert losses[-1] == pytest.approx(-0.5, abs=1e-3)


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


class NoHostRead(TorchDispatchMode):
    """Fails where a tensor's value would be read by the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in (
            "_local_scalar_dense",
            "item",
            "nonzero",
            "is_nonzero",
            "equal",
            "masked_select",
            "unique",
        ), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("curvature", ["forward", "double_backward"])
@pytest.mark.parametrize("loss", [F.cross_entropy, lambda out, y: F.cross_entropy(out, y) + out.logsumexp(1).mean()])
def test_no_host_read(backend: str, curvature: str, loss: Any) -> None:
    net, x, y = small()
    groups = [
        dict(params=net[0].parameters()),
        dict(params=net[1].parameters(), lr=0.5),
        dict(params=net[4].parameters()),
    ]
    optimizer = CurveBall(groups, lr=torch.tensor(0.3), curvature=curvature, backend=backend, lambda_interval=2)
    optimizer.step(lambda: net(x), lambda out: loss(out, y))
    with NoHostRead():
        for _ in range(4):
            optimizer.step(lambda: net(x), lambda out: loss(out, y))
            optimizer.stats()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostRead():
        optimizer.stats()["beta"].item()


def test_stats_before_the_first_step() -> None:
    stats = CurveBall(nn.Linear(2, 2).parameters(), lambd=3.0).stats()
    assert set(stats) == {
        "loss", "beta", "rho", "lambd", "predicted_change", "ratio", "skipped_steps", "safe_steps",
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


def test_autocast_around_the_step_looks_at_the_new_weights() -> None:
    """Autocast caches half-precision copies of the weights, which the update makes stale."""
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 3), torch.randn(10, 4), torch.randint(0, 3, (10,))
    optimizer = CurveBall(net.parameters(), lambda_interval=1)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            advance(optimizer, net, x, y)
        assert optimizer.stats()["ratio"] > 0.1


@pytest.mark.parametrize("curvature", ["forward", "double_backward"])
def test_outputs_that_are_parameters_are_those_before_the_step(curvature: str) -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    _, outputs = CurveBall([w], curvature=curvature).step(lambda: w.view(2, 1), lambda out: out.square().sum())
    assert outputs.flatten().tolist() == [1, 2] and w.tolist() != [1, 2]


def test_gradient_hooks_are_accounted_for() -> None:
    """With r scaled by 0.1, β is ten times larger: unless r·r is taken from Jr·c, which the hook has not seen."""
    betas = []
    for scale in (1.0, 0.1):
        net, x, y = small(dtype=torch.float64)
        for p in net.parameters():
            p.register_hook(lambda g: scale * g)
        optimizer = CurveBall(net.parameters(), lambd=2.0)
        advance(optimizer, net, x, y)
        betas.append(optimizer.stats()["beta"])
    torch.testing.assert_close(betas[1], 10 * betas[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_expecting_to_climb_raises_the_damping(backend: str) -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters(), beta=5.0, rho=0.9, backend=backend, lambda_interval=1, lambda_factor=0.5)
    advance(optimizer, net, x, y, 2)
    assert optimizer.stats()["predicted_change"] > 0 and optimizer.stats()["lambd"] > 1


def test_an_error_in_the_look_at_the_new_weights_leaves_a_complete_step() -> None:
    net, x, y = small()
    twin, calls = copy.deepcopy(net), []

    def fails_the_fourth_time() -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("no such thing")
        return net(x)

    optimizer, other = CurveBall(net.parameters()), CurveBall(twin.parameters())
    torch.manual_seed(3)
    with pytest.raises(KeyError):
        optimizer.step(fails_the_fourth_time, lambda out: F.cross_entropy(out, y))
    torch.manual_seed(3)
    advance(other, twin, x, y)
    keys = ("beta", "rho", "loss", "predicted_change")
    assert_equal([optimizer.stats()[k] for k in keys], [other.stats()[k] for k in keys])
    for o, model in ((optimizer, net), (other, twin)):
        o._states["curveball"]["scalars"][2] = 1.0  # λ, the only thing that the look would have changed
        torch.manual_seed(4)
        advance(o, model, x, y, 2)
    assert_equal(list(net.state_dict().values()), list(twin.state_dict().values()))


def test_model_converted_in_the_middle() -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters())
    advance(optimizer, net, x, y, 2)
    z = [optimizer.state[p]["z"].clone() for p in net.parameters()]
    net.double()
    advance(optimizer, net, x.double(), y)
    assert all(optimizer.state[p]["z"].dtype == torch.float64 for p in net.parameters())
    assert all(not torch.equal(optimizer.state[p]["z"].float(), a) for p, a in zip(net.parameters(), z, strict=True))


def test_update_outside_no_grad_and_stale_graphs() -> None:
    w = nn.Parameter(torch.ones(3))
    old = (w * w).sum()
    z_dot_z = ops.update_([w], [torch.ones(3)], [torch.ones(3)], torch.tensor([0.1, 0.9, 0.0]).double(), lr=1.0)
    assert z_dot_z.grad_fn is None and w.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()
