"""Parameters that a step would be wrong for, refused by the constructor or before the first step changes anything."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from curveball_fused import CurveBall

ROOT = Path(__file__).parents[2]


def over(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor)


def tied_by_data() -> list[nn.Parameter]:
    a, b, c = (nn.Parameter(torch.randn(3, 3)) for _ in range(3))
    c.data = a.data
    return [a, b, c]


def overlapping(first: slice, second: slice) -> list[nn.Parameter]:
    flat = torch.randn(20)
    return [over(flat[first]), over(flat[second])]


def transposed() -> list[nn.Parameter]:
    matrix = torch.randn(4, 3)
    return [over(matrix), over(matrix.t())]


def of_another_dtype() -> list[nn.Parameter]:
    flat = torch.randn(8)
    return [over(flat), over(flat.view(torch.bfloat16)[3:5])]


def within_a_row() -> list[nn.Parameter]:
    """A block of columns, and one column of it."""
    matrix = torch.randn(4, 6)
    return [over(matrix[:, 1:4]), over(matrix[:, 0]), over(matrix[:, 3])]


def from_numpy() -> list[nn.Parameter]:
    """Two storages over one memory."""
    array = torch.zeros(6).numpy()
    return [over(torch.from_numpy(array)), over(torch.from_numpy(array)[2:])]


TIED: list[Callable[[], list[nn.Parameter]]] = [
    tied_by_data,
    transposed,
    of_another_dtype,
    within_a_row,
    from_numpy,
    lambda: overlapping(slice(0, 10), slice(9, 20)),
    lambda: overlapping(slice(0, 20), slice(5, 6)),
    lambda: overlapping(slice(0, 20, 2), slice(4, 5)),
    lambda: overlapping(slice(0, 20, 2), slice(1, 20, 3)),
]


def flat_buffer() -> list[nn.Parameter]:
    flat = torch.randn(30)
    return [over(flat[:10]), over(flat[10:12]), over(flat[12:].view(3, 6)), over(flat[12:12]), over(flat[4:4])]


def columns() -> list[nn.Parameter]:
    matrix = torch.randn(4, 6)
    return [over(matrix[:, i]) for i in range(3)] + [over(matrix[:, 4:])]


def mixed_dtypes_of_one_buffer() -> list[nn.Parameter]:
    flat = torch.randn(8)
    return [over(flat[:4]), over(flat.view(torch.bfloat16)[8:])]


APART: list[Callable[[], list[nn.Parameter]]] = [
    flat_buffer,
    columns,
    mixed_dtypes_of_one_buffer,
    lambda: overlapping(slice(0, 20, 2), slice(1, 20, 2)),
    lambda: [nn.Parameter(torch.empty(3, device="meta")) for _ in range(2)],
    lambda: [nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))],
]


@pytest.mark.parametrize("tied", TIED)
def test_two_parameters_over_one_memory_are_refused(tied: Callable[[], list[nn.Parameter]]) -> None:
    params = tied()
    with pytest.raises(ValueError, match=r"one memory.*one nn\.Parameter in both places"):
        CurveBall(params)
    with pytest.raises(ValueError, match="one memory"):
        CurveBall(params[::-1])
    optimizer = CurveBall(params[:1])
    with pytest.raises(ValueError, match="one memory"):
        optimizer.add_param_group(dict(params=params[1:]))
    assert len(optimizer.param_groups) == len(optimizer.state) == 1


@pytest.mark.parametrize("apart", APART)
def test_views_of_one_buffer_that_do_not_overlap_are_fine(apart: Callable[[], list[nn.Parameter]]) -> None:
    CurveBall(apart())


def test_fake_tensors_have_no_memory() -> None:
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(3)) for _ in range(2)]
        CurveBall(params)


def test_one_parameter_in_two_places_is_fine() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    CurveBall(net.parameters()).step(lambda: net(torch.ones(2, 3)), lambda out: out.square().sum())


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_one_parameter_given_twice_is_refused() -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"parameters 1 and 2 are the same one.*give it once"):
        CurveBall([net.weight, net.bias, net.bias])


@pytest.mark.parametrize("steps", [0, 1])
def test_memory_that_is_shared_after_construction_is_seen(steps: int) -> None:
    """Before the first step, and where others are trained than in the last."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = CurveBall(net.parameters())
    step = lambda: optimizer.step(lambda: net(torch.ones(2, 3)), lambda out: out.square().sum())  # noqa: E731
    for _ in range(steps):
        step()
    net[1].weight.data = net[0].weight.data
    net[0].bias.requires_grad_(steps == 0)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="parameters 0 and 2 are two tensors over one memory"):
        step()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_elements_over_one_memory_are_refused() -> None:
    with pytest.raises(ValueError, match=r"elements of parameter 1 share memory.*clone"):
        CurveBall([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1).expand(4))])


def test_looking_at_the_memory_of_thousands_of_parameters_is_cheap() -> None:
    flat = torch.zeros(20_000)
    params = [nn.Parameter(flat[2 * i : 2 * i + 2]) for i in range(10_000)]
    begin = time.perf_counter()
    CurveBall(params)
    assert time.perf_counter() - begin < 5  # 0.2 s, where every pair would take minutes


class NoFloat64(TorchDispatchMode):
    """Refuse tensors of float64, as a device does that lacks it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device.type == "meta" and result.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return result


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_device_without_float64_is_refused(backend: str) -> None:
    params = [nn.Parameter(torch.empty(3, device="meta"))]
    with NoFloat64(), pytest.raises(RuntimeError, match=r"needs float64 on the parameters' device.*meta has none"):
        CurveBall(params, backend=backend)
