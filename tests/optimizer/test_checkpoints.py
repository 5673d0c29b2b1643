"""Checkpoints resume bit for bit; copies share nothing; state keeps its precision."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from curveball_fused import CurveBall
from tests.helpers.tiers import slow
from tests.helpers.training import SETTINGS, advance, assert_equal, everything, small

ROOT = Path(__file__).parents[2]
RESUMED = [(torch.bfloat16, 3), (torch.float32, 0), (torch.bfloat16, 0)]
RESUME = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from tests.helpers.training import SETTINGS, CurveBall, advance, everything, small
net, x, y = small(dtype=getattr(torch, sys.argv[3]))
optimizer = CurveBall(net.parameters(), **dict(SETTINGS, lambd=77.0, lr=0.1))
saved = torch.load(sys.argv[2], weights_only=True)
net.load_state_dict(saved["net"])
optimizer.load_state_dict(saved["optimizer"])
torch.set_rng_state(saved["rng"])
advance(optimizer, net, x, y, 5)
torch.save(everything(optimizer, net), sys.argv[2])
"""


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 3), *[slow(*case) for case in RESUMED]])
def test_resumes_bit_for_bit_in_a_new_process(tmp_path: Path, steps: int, dtype: torch.dtype) -> None:
    net, x, y = small(dtype=dtype)
    optimizer = CurveBall(net.parameters(), **SETTINGS)
    if steps:
        advance(optimizer, net, x, y, steps)
    file = tmp_path / "checkpoint.pt"
    torch.save(dict(net=net.state_dict(), optimizer=optimizer.state_dict(), rng=torch.get_rng_state()), file)
    advance(optimizer, net, x, y, 5)
    subprocess.run([sys.executable, "-c", RESUME, str(ROOT), str(file), str(dtype).split(".")[1]], check=True)
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


def test_model_converted_in_the_middle() -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters())
    advance(optimizer, net, x, y, 2)
    z = [optimizer.state[p]["z"].clone() for p in net.parameters()]
    net.double()
    advance(optimizer, net, x.double(), y)
    assert all(optimizer.state[p]["z"].dtype == torch.float64 for p in net.parameters())
    assert all(not torch.equal(optimizer.state[p]["z"].float(), a) for p, a in zip(net.parameters(), z, strict=True))


@pytest.mark.parametrize("broken", ["no dictionary", "step", "compute_dtype", "history"])
def test_an_incomplete_checkpoint_is_refused(broken: str) -> None:
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = CurveBall([w])
    optimizer.step(lambda: w * 1.0, lambda out: out.square().sum())
    saved = optimizer.state_dict()
    if broken == "no dictionary":
        saved["state"]["curveball"] = 3
        saved["state"][0] = {"z": saved["state"][0]["z"]}
    else:
        del saved["state"][0][broken]
    with pytest.raises(ValueError, match="missing or of another version"):
        optimizer.load_state_dict(saved)


def test_a_metric_that_is_lost_on_the_way_is_an_error() -> None:
    """A flattened state is taken over for what the optimizer that loads it has state for, and the options all."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    net, x, y = small()
    optimizer = CurveBall(net.parameters(), preconditioner="kronecker")
    advance(optimizer, net, x, y, 3)
    model_state, state = get_state_dict(net, optimizer, options=flat)
    other = CurveBall(net.parameters())
    with pytest.raises(ValueError, match="lost the metric"):
        set_state_dict(net, other, model_state_dict=model_state, optim_state_dict=state, options=flat)
