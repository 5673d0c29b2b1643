"""Steps on a device that has no memory and no host can read: a script, which says at the end what it has seen.

torch's fake tensors have shapes, dtypes and a device, but no values. On them a step runs as on a GPU, kernels left out:
what reads a value raises, a tensor of the host among those of the device raises, and every copy between them is seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from curveball_fused import CurveBall, backends, guard
from curveball_fused.cuda_graphs.host_reads import HostRead, NoHostReads

warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
_setup_privateuseone_for_python_backend("fakegpu")
DEVICE = torch.device("fakegpu")
torch.fakegpu.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]


def moved(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype, device=DEVICE))
        for name, b in module._buffers.items():
            if b is not None:
                of = dtype if b.is_floating_point() else b.dtype
                module._buffers[name] = torch.empty(b.shape, dtype=of, device=DEVICE)
    return net


def net_and_batch(dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    net = nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.1), nn.LayerNorm(16), nn.Linear(16, 4)
    )
    x = torch.empty(5, 8, dtype=dtype, device=DEVICE)
    return moved(net, dtype), x, torch.zeros(5, dtype=torch.long, device=DEVICE)


class Everything(set[Any]):
    """All maps are known to the guard: there are no values that a first step could read."""

    def __contains__(self, _: object) -> bool:
        return True


def run(dtype: torch.dtype, options: dict[str, Any]) -> None:
    net, x, y = net_and_batch(dtype)
    first, *others = net.parameters()
    optimizer = CurveBall([dict(params=[first]), dict(params=others)], backend="torch", **options)
    optimizer.param_groups[0]["lr"] = torch.ones((), device=DEVICE)  # whose value the constructor would check
    guard._known[optimizer] = Everything()
    with NoHostReads(DEVICE):
        for _ in range(3):
            loss, outputs = optimizer.step(lambda: net(x), lambda out: F.cross_entropy(out, y))
            optimizer.stats()
    assert loss.device == outputs.device == x.device and outputs.dtype == dtype


def told(read: Callable[[Tensor], Any]) -> None:
    try:
        with NoHostReads(DEVICE):
            read(torch.empty(3, device=DEVICE))
    except HostRead:
        return
    raise AssertionError("a read was not told")


OPTIONS: list[dict[str, Any]] = [
    {},
    dict(lambda_interval=2, weight_decay=0.1),
    dict(average=0.8, direction="gradient", solve_interval=2),
    dict(preconditioner="kronecker", solve_interval=2),
    dict(curvature="forward"),
    dict(curvature="double_backward"),
]
READS: list[Callable[[Tensor], Any]] = [
    Tensor.cpu,
    Tensor.nonzero,
    lambda t: t.sum().item(),
    lambda t: t.copy_(torch.ones(3)),
]

if __name__ == "__main__":
    choose = backends.choose
    runs = 0
    # The operators, of which fake tensors see the fake kernels; and plain torch.
    for chosen in ["cpu", "torch"] if backends.has_operators() else ["torch", "torch"]:
        backends.choose = lambda backend, device, chosen=chosen: chosen  # type: ignore[assignment]
        for given in OPTIONS:
            for precision in (torch.float32, torch.bfloat16, torch.float16):
                with FakeTensorMode():
                    run(precision, given)
                runs += 1
    for reading in READS:
        with FakeTensorMode():
            told(reading)
    print(f"{runs} runs: no host read, no copy; {len(READS)} reads told")
