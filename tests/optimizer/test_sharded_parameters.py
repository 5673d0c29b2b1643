"""Parts of weights are refused by the constructor: docs/sharded.md says why, and how it would be done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from curveball_fused import CurveBall

distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A group of a single process: what makes shards is the same code as with several."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def made() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def fully_sharded() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    net = made()
    for part in (net[0], net):
        fully_shard(part)
    return net


def older(use_orig_params: bool) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(made(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))

    return make


def tensor_parallel() -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = distributed.init_device_mesh("cpu", (1,))
    return parallelize_module(made(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def distributed_by_hand() -> nn.Module:
    from torch.distributed.tensor import distribute_module

    return distribute_module(made(), distributed.init_device_mesh("cpu", (1,)))


SHARDED = [fully_sharded, older(False), older(True), tensor_parallel, distributed_by_hand]
NAMES = ["fully_shard", "flat", "use_orig_params", "tensor parallel", "distribute_module"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("make", SHARDED, ids=NAMES)
def test_sharded_parameters_are_refused(one_process: None, make: Callable[[], nn.Module]) -> None:
    net = make()
    with pytest.raises(TypeError, match=r"parameter 0 is sharded, by fully_shard.*Keep the weights whole"):
        CurveBall(net.parameters())
    whole = nn.Linear(3, 2)
    optimizer = CurveBall(whole.parameters())
    with pytest.raises(TypeError, match="is sharded"):
        optimizer.add_param_group(dict(params=net.parameters()))
    assert len(optimizer.param_groups) == 1


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_model_that_is_sharded_later_is_an_error_before_anything_is_changed(one_process: None) -> None:
    from torch.distributed.fsdp import fully_shard

    net = made()
    optimizer = CurveBall(net.parameters())
    before = [p.detach().clone() for p in net.parameters()]
    fully_shard(net)
    with pytest.raises(RuntimeError, match="does not depend on any parameter of this optimizer"):
        optimizer.step(lambda: net(torch.ones(3, 4)), lambda out: out.square().mean())
    net.reshard()
    assert all(torch.equal(p.full_tensor(), b) for p, b in zip(net.parameters(), before, strict=True))
