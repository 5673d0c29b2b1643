"""How the kernels are launched: streams, graphs, other devices, no waiting, few launches, the same bits every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from curveball_fused import ops
from curveball_fused.backends.scalars import SCALARS
from tests.gpu.device import DEVICE, DTYPES, draw, every_backend, launches, resnet50, to_device
from tests.gpu.operators import Inputs, make, run

CYCLES = 200_000_000  # some 100 ms: the host has queued everything long before


def assert_equal_bits(results: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(a.nan_to_num(nan=-1.5), b.nan_to_num(nan=-1.5)), f"result {i}"


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def delayed_copy(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Other tensors, of other random numbers until the current stream, some time from now, copies `inputs` to them."""
    late = make(dtype)
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    for target, source in zip(late.tensors(), inputs.tensors(), strict=True):
        target.copy_(source)
    return late


@every_backend
def test_the_same_bits_in_100_runs_beside_other_work(backend: str) -> None:
    inputs = make(torch.float32, (*resnet50()[-30:], (1,), (1_000_003,)))
    expected = [t.clone() for t in run(inputs, backend)]
    other, a = torch.cuda.Stream(), draw((2048, 2048), torch.float32)
    b, noise = torch.empty_like(a), torch.empty(2**24, device=DEVICE)
    other.wait_stream(torch.cuda.current_stream())
    for i in range(100):
        with torch.cuda.stream(other):
            torch.mm(a, a, out=b)
            noise.normal_()
        # Freed memory holds the last run's results; with something else in between, other parts are handed out.
        spoil = torch.full((1000 * (i % 7) + 1,), float("nan"), device=DEVICE)
        assert_equal_bits(run(inputs, backend), expected)
        del spoil
    other.synchronize()


@every_backend
def test_no_call_waits_for_the_device(backend: str) -> None:
    for dtype in DTYPES:
        inputs = make(dtype)
        run(inputs, backend)  # compiles
        fresh = make(dtype)  # other addresses, so that nothing is found in a cache
        with no_synchronisation():
            run(fresh, backend)


@every_backend
def test_the_current_stream_is_used(backend: str) -> None:
    """Operators queued behind a slow producer in another stream see what it wrote."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make(dtype)
        expected = run(inputs, backend)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Twice, for when torch's allocators ask the driver for memory, that may wait for the device.
        for _ in range(2):
            with torch.cuda.stream(stream):
                results = run(delayed_copy(inputs, dtype), backend)
                behind = not stream.query()
            stream.synchronize()
            assert_equal_bits(results, expected)
            del results
        assert behind, "the producer was done before the operators were queued: nothing was tested"


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_graph_repeats_the_eager_bits(backend: str, dtype: torch.dtype) -> None:
    inputs, others = make(dtype), [make(dtype) for _ in range(3)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(inputs, backend)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(inputs, backend)
    for other in others:
        expected = run(other, backend)
        for target, source in zip(inputs.tensors(), other.tensors(), strict=True):
            target.copy_(source)
        graph.replay()
        assert_equal_bits(results, expected)


@every_backend
def test_a_captured_update_goes_on_from_where_it_stands(backend: str) -> None:
    """In-place updates of static tensors: ten replays equal ten eager calls."""
    w, z, r = ([draw(shape, torch.float32) for shape in resnet50()[:20]] for _ in range(3))
    scalars, rate = to_device(0.1, 0.9, 0.2, *[0.0] * (len(SCALARS) - 3)), to_device(0.3)[0]

    def step(w: list[Tensor], z: list[Tensor]) -> Tensor:
        return ops.update_groups_(
            w, z, r, scalars, group_sizes=[len(w)], lr=[rate], weight_decay=[0.1], backend=backend
        )

    eager = [t.clone() for t in w], [t.clone() for t in z]
    for _ in range(10):
        expected = step(*eager)
    step([t.clone() for t in w], [t.clone() for t in z])  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = step(w, z)
    for _ in range(10):
        graph.replay()
    assert_equal_bits([*w, *z, total], [*eager[0], *eager[1], expected])


@every_backend
def test_the_parameter_arithmetic_is_three_launches(backend: str) -> None:
    """Copies and fills count, as kernels do."""
    w, z, r = ([draw(shape, torch.float32) for shape in resnet50()] for _ in range(3))
    scalars, products, loss = to_device(*[0.5] * len(SCALARS)), to_device(-0.5, 1.5, 0.7, 0.3, 2.0), to_device(1.25)[0]

    def step() -> None:
        solved = ops.solve(scalars, loss, products, lr=0.7, backend=backend)
        ops.update_groups_(
            w, z, r, solved, group_sizes=[100, 61], lr=[0.7, 0.5], weight_decay=[0.1, 0.0], backend=backend
        )

    found = launches(step)
    assert 2 <= len(found) <= 3, found


@every_backend
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_than_the_current_device(backend: str) -> None:
    inputs = make(torch.float32)
    expected = run(inputs, backend)
    moved = Inputs(**{name: _to(value, torch.device("cuda", 1)) for name, value in vars(inputs).items()})
    assert torch.cuda.current_device() == 0
    assert_equal_bits([t.to(DEVICE) for t in run(moved, backend)], expected)


def _to(value: object, device: torch.device) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    assert isinstance(value, (list, tuple))
    return type(value)(_to(part, device) for part in value)


@every_backend
def test_tensors_on_two_devices_are_refused(backend: str) -> None:
    w, z, r = ([draw((3,), torch.float32), draw((4,), torch.float32)] for _ in range(3))
    w[1], before = w[1].cpu(), w[0].clone()
    with pytest.raises((RuntimeError, ValueError)):
        ops.update_(w, z, r, to_device(0.3, 0.8, 0.25), lr=1.0, backend=backend)
    assert torch.equal(w[0], before)


@every_backend
def test_two_streams_with_the_same_tensors(backend: str) -> None:
    """The second stream does not wait for the first, nor rely on what is still queued there.

    Last, like the test before: a kernel that reads wrong addresses takes the whole process with it.
    """
    z, r = ([draw(shape, torch.float32) for shape in resnet50()] for _ in range(2))
    expected = ops.dots(z, r, backend=backend)
    # Other addresses each time, so that nothing is found in a cache; and twice, as above.
    copies = [([t.clone() for t in z], [t.clone() for t in r]) for _ in range(2)]
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    for fresh_z, fresh_r in copies:
        with torch.cuda.stream(first):
            torch.cuda._sleep(CYCLES)
            slow = ops.dots(fresh_z, fresh_r, backend=backend)
        with torch.cuda.stream(second):
            quick = ops.dots(fresh_z, fresh_r, backend=backend)
        second.synchronize()
        ahead = not first.query()
        first.synchronize()
        assert_equal_bits([slow, quick], [expected, expected])
        del slow, quick
    assert ahead, "the second stream waited for the first"
