"""On the GPU: no step waits for the device, and graphed steps equal ordinary ones in every bit."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import CosineAnnealingLR

from curveball_fused import CurveBall, make_graphed_step
from tests.gpu.device import BACKENDS, DEVICE, launches

STEPS = 200
BATCHES = 5
SMALL = dict(lambda_interval=3, lambda_factor=0.97)
CASES: dict[str, tuple[torch.dtype | None, dict[str, Any]]] = {
    "default": (None, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float16": (torch.float16, {}),
    "damping and averages": (None, SMALL | dict(average=0.8, direction="gradient", solve_interval=4)),
    "kronecker": (None, dict(preconditioner="kronecker")),
    "dual numbers": (None, SMALL | dict(curvature="forward")),
    "double backward": (None, dict(curvature="double_backward")),
    "fixed damping": (None, dict(auto_lambda=False, rho=0.9)),
}
every_case = pytest.mark.parametrize(("half", "options"), CASES.values(), ids=CASES)


class Net(nn.Module):
    """Convolution, batch norm, dropout, attention and layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2))
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((tokens + y).mean(1))


def start(**options: Any) -> tuple[nn.Module, CurveBall]:
    torch.manual_seed(3)
    model = Net().to(DEVICE)
    groups = [dict(params=model.stem.parameters(), weight_decay=0.1), dict(params=model.norm.parameters(), lr=0.7)]
    groups += [dict(params=[*model.qkv.parameters(), *model.head.parameters()])]
    return model, CurveBall(groups, **options)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator(DEVICE).manual_seed(4)
    x = torch.randn(BATCHES, 32, 3, 8, 8, device=DEVICE, generator=generator)
    return [(x[i], (torch.arange(32, device=DEVICE) + i) % 5) for i in range(BATCHES)]


def forward(model: nn.Module, half: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    def model_fn(x: Tensor) -> Tensor:
        with torch.autocast("cuda", half or torch.bfloat16, enabled=half is not None):
            return model(x)

    return model_fn


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def deterministic() -> Iterator[None]:
    """The same bits in every run: without fused attention, whose backward pass adds in any order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@every_case
@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_no_step_waits(backend: str, half: torch.dtype | None, options: dict[str, Any]) -> None:
    model, optimizer = start(backend=backend, **options)
    model_fn = forward(model, half)
    (x, y), *_ = batches()

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.step(lambda: model_fn(x), lambda out: F.cross_entropy(out, y))
            optimizer.stats()

    steps(6)  # kernels are compiled and chosen, which may wait
    with no_waiting():
        steps(6)
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
        optimizer.stats()["loss"].item()


def trained(graphed: bool, half: torch.dtype | None, steps: int, **options: Any) -> tuple[list[Tensor], CurveBall]:
    """All that training leaves, and the optimizer."""
    with deterministic():
        model, optimizer = start(**options)
        scheduler = CosineAnnealingLR(optimizer, steps)
        model_fn, data = forward(model, half), batches()
        torch.manual_seed(9)
        step = make_graphed_step(optimizer, model_fn, F.cross_entropy, data[2]) if graphed else None
        losses = []
        for i in range(steps):
            x, y = data[i % BATCHES]
            if step is not None:
                losses.append(step(x, y)[0])
            else:
                losses.append(optimizer.step(lambda: model_fn(x), lambda out: F.cross_entropy(out, y))[0])
            scheduler.step()
        state = [t.clone() for t in model.state_dict().values()]
        return [torch.stack(losses), *state, *optimizer.history().values(), torch.cuda.get_rng_state()], optimizer


@every_case
@pytest.mark.parametrize("backend", BACKENDS)
def test_graphed_steps_equal_ordinary_ones(backend: str, half: torch.dtype | None, options: dict[str, Any]) -> None:
    steps = STEPS if options == {} else 30
    ordinary, _ = trained(False, half, steps, backend=backend, **options)
    replayed, optimizer = trained(True, half, steps, backend=backend, **options)
    for a, b in zip(ordinary, replayed):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert optimizer.state_dict()["state"][0]["step"] == steps


def test_replays_do_not_wait_and_take_batches_of_the_host() -> None:
    model, optimizer = start()
    data = batches()
    step = make_graphed_step(optimizer, model, F.cross_entropy, data[0])
    pinned = [(x.cpu().pin_memory(), y.cpu().pin_memory()) for x, y in data]
    torch.cuda.synchronize()
    with no_waiting():
        for x, y in pinned:
            optimizer.param_groups[0]["lr"] *= 0.9
            step(x, y)
    assert all(loss.isfinite() for loss in optimizer.history()["loss"])


@deterministic()
def test_graphs_outlive_memory_pressure_and_checkpoints() -> None:
    """What a replay reads is held, whatever else is allocated and freed in between."""
    results = []
    for pressure in (False, True):
        model, optimizer = start()
        data = batches()
        step = make_graphed_step(optimizer, model, F.cross_entropy, data[0])
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        for i in range(12):
            if pressure:
                gc.collect()
                torch.cuda.empty_cache()
                _ = [torch.full((1 << 20,), torch.nan, device=DEVICE) for _ in range(20)]
            if i == 6:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                torch.manual_seed(1)
            step(*data[i % BATCHES])
        results.append([*model.state_dict().values(), *optimizer.stats().values()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_what_prevents_a_graph_is_named() -> None:
    model, optimizer = start()

    def reads(x: Tensor) -> Tensor:
        return model(x) * (2.0 if x.sum() > 1e9 else 1.0)

    with pytest.raises(RuntimeError, match=r"test_gpu_graphs\.py:\d+, in reads"):
        make_graphed_step(optimizer, reads, F.cross_entropy, batches()[0])
    x, y = batches()[0]
    assert optimizer.step(lambda: model(x), lambda out: F.cross_entropy(out, y))[0].isfinite()


def test_a_replay_launches_what_a_step_does() -> None:
    model, optimizer = start(auto_lambda=False)
    x, y = batches()[0]
    step = make_graphed_step(optimizer, model, F.cross_entropy, (x, y))
    ordinary = launches(lambda: optimizer.step(lambda: model(x), lambda out: F.cross_entropy(out, y)))
    assert len(launches(lambda: step(x, y))) <= len(ordinary) + 12  # batch, rates, history, loss, generators
