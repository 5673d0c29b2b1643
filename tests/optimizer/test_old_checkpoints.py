"""Checkpoints of earlier versions load, and training goes on from them."""

from __future__ import annotations

import copy
import gzip
from pathlib import Path
from typing import Any

import pytest
import torch

from curveball_fused import CurveBall
from tests.helpers.training import SETTINGS, advance, assert_equal, everything, small

FILE = Path(__file__).parent / "data" / "checkpoint-before-the-packages.pt.gz"


@pytest.fixture
def saved() -> dict[str, Any]:
    """What the flat package had after four steps, and all its figures after three more."""
    with gzip.open(FILE) as file:
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_a_checkpoint_from_before_the_packages_is_taken_over_bit_for_bit(saved: dict[str, Any]) -> None:
    net, _, _ = small(1)
    optimizer = CurveBall(net.parameters())
    before = copy.deepcopy(saved["optimizer"])
    optimizer.load_state_dict(saved["optimizer"])
    own, theirs = optimizer.state_dict()["state"], before["state"]
    assert_equal([own[i]["z"] for i in range(6)], [theirs[i]["z"] for i in range(6)])
    shared, former = own["curveball"], theirs["curveball"]
    tensors = [name for name, value in former.items() if isinstance(value, torch.Tensor)]
    assert set(tensors) >= {"scalars", "history", "system", "scale"}
    assert_equal([shared[name] for name in tensors], [former[name] for name in tensors])
    assert {"way", "half"} <= former.keys() and not {"way", "half"} & shared.keys()
    assert (shared["method"], shared["compute_dtype"], shared["step"]) == (former["way"], None, 4)
    groups = [{k: v for k, v in group.items() if k in SETTINGS} for group in optimizer.param_groups]
    assert groups == [SETTINGS]
    assert saved["optimizer"]["state"].keys() == theirs.keys()
    assert saved["optimizer"]["state"]["curveball"].keys() == former.keys()  # the caller's own is left alone


def test_training_goes_on_from_a_checkpoint_from_before_the_packages(saved: dict[str, Any]) -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters())
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    advance(optimizer, net, x, y, 3)
    for ours, theirs in zip(everything(optimizer, net), saved["after"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # another processor may round differently


@pytest.mark.parametrize(
    ("half", "compute_dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16), (None, None), ("", None)]
)
def test_the_half_precision_of_former_times_is_a_dtype(saved: dict[str, Any], half: Any, compute_dtype: Any) -> None:
    saved["optimizer"]["state"]["curveball"]["half"] = half
    net, _, _ = small()
    optimizer = CurveBall(net.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.state["curveball"]["compute_dtype"] is compute_dtype


def test_an_optimizer_that_was_pickled_whole_goes_on(saved: dict[str, Any]) -> None:
    """pickle restores attributes without load_state_dict."""
    net, x, y = small()
    net.load_state_dict(saved["net"])
    reference = CurveBall(net.parameters())
    reference.load_state_dict(saved["optimizer"])
    attributes = reference.__getstate__()
    attributes["state"] = dict(attributes["state"]) | {"curveball": dict(saved["optimizer"]["state"]["curveball"])}
    restored = CurveBall.__new__(CurveBall)
    restored.__setstate__(attributes)
    torch.set_rng_state(saved["rng"])
    advance(restored, net, x, y, 3)
    for ours, theirs in zip(everything(restored, net), saved["after"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
