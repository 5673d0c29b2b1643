"""Checkpoints of earlier versions load, and training goes on from them."""

from __future__ import annotations

import copy
import gzip
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curveball_fused import CurveBall
from curveball_fused.backends.scalars import LAMBD, SCALARS
from tests.helpers.training import SETTINGS, advance, assert_equal, everything, small

DATA = Path(__file__).parent / "data"
FORMER = 11  # scalars


def with_more_scalars(former: Tensor) -> Tensor:
    """Scalars, or rows of them, as they are today: λ is the direction damping, and the rest has not begun."""
    zeros = torch.zeros_like(former)
    return torch.cat((former, former[..., LAMBD : LAMBD + 1], zeros[..., : len(SCALARS) - FORMER - 1]), dim=-1)


def assert_taken_over(entry: dict[str, Any], former: dict[str, Any]) -> None:
    assert former["scalars"].shape == (FORMER,)
    expected = [with_more_scalars(former["scalars"]), with_more_scalars(former["history"]), former["scale"]]
    assert_equal([entry["scalars"], entry["history"], entry["scale"]], expected)
    assert "system" not in entry


def loaded(name: str) -> dict[str, Any]:
    with gzip.open(DATA / f"{name}.pt.gz") as file:
        result: dict[str, Any] = torch.load(file, weights_only=True)
    return result


@pytest.fixture
def saved() -> dict[str, Any]:
    """What the flat package had after four steps, and all its figures after three more."""
    return loaded("checkpoint-before-the-packages")


@pytest.fixture
def with_a_string_key() -> dict[str, Any]:
    """The same of an optimizer with the numbers of all parameters under a key of their own, and both pickled whole."""
    return loaded("checkpoint-under-a-string-key")


@pytest.fixture
def with_eleven_scalars() -> dict[str, Any]:
    """The same with the numbers of all parameters under a parameter, and before steps remembered more of them."""
    return loaded("checkpoint-of-eleven-scalars")


def two_groups(seed: int = 0) -> tuple[nn.Module, CurveBall, Tensor, Tensor]:
    """The net and the optimizer of the last two of these files, in which the first parameter is frozen."""
    net, x, y = small(seed)
    net[0].weight.requires_grad_(False)
    groups = [dict(params=[*net[0].parameters()]), dict(params=[*net[1].parameters(), *net[4].parameters()])]
    return net, CurveBall(groups, backend="torch"), x, y


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """The last figures of ours are the guard's, which came later."""
    for a, b in zip(ours[:-2], theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # another processor may round differently


def test_a_checkpoint_from_before_the_packages_is_taken_over_bit_for_bit(saved: dict[str, Any]) -> None:
    net, _, _ = small(1)
    optimizer = CurveBall(net.parameters())
    before = copy.deepcopy(saved["optimizer"])
    optimizer.load_state_dict(saved["optimizer"])
    own, theirs = optimizer.state_dict()["state"], before["state"]
    assert_equal([own[i]["z"] for i in range(6)], [theirs[i]["z"] for i in range(6)])
    former = theirs["curveball"]
    assert_taken_over(own[0], former)
    shared = optimizer._current()
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
    assert_close(everything(optimizer, net), saved["after"])


@pytest.mark.parametrize(
    ("half", "compute_dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16), (None, None), ("", None)]
)
def test_the_half_precision_of_former_times_is_a_dtype(saved: dict[str, Any], half: Any, compute_dtype: Any) -> None:
    saved["optimizer"]["state"]["curveball"]["half"] = half
    net, _, _ = small()
    optimizer = CurveBall(net.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer._current()["compute_dtype"] is compute_dtype


def test_an_optimizer_that_was_pickled_whole_goes_on(saved: dict[str, Any]) -> None:
    """pickle restores attributes without load_state_dict."""
    net, x, y = small()
    net.load_state_dict(saved["net"])
    theirs = saved["optimizer"]["state"]
    attributes = CurveBall(net.parameters(), **SETTINGS).__getstate__()
    attributes["state"] = {p: theirs[i] for i, p in enumerate(net.parameters())} | {"curveball": theirs["curveball"]}
    restored = CurveBall.__new__(CurveBall)
    restored.__setstate__(attributes)
    assert all(isinstance(p, Tensor) for p in restored.state)
    torch.set_rng_state(saved["rng"])
    advance(restored, net, x, y, 3)
    assert_close(everything(restored, net), saved["after"])


@pytest.mark.parametrize("how", ["state_dict", "pickled whole"])
def test_the_numbers_under_a_string_key_move_to_a_parameter(with_a_string_key: dict[str, Any], how: str) -> None:
    saved = with_a_string_key
    former = saved["optimizer"]["state"]["curveball"]
    net, optimizer, x, y = two_groups()
    if how == "state_dict":
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
    else:
        net, optimizer = pickle.loads(saved["pickled"])
    trained = [p for p in net.parameters() if p.requires_grad]
    assert set(optimizer.state) == set(trained)
    assert_taken_over(optimizer.state[trained[0]], former)
    assert optimizer._current()["method"] == former["method"]
    assert_equal([optimizer.state[p]["z"] for p in trained], [saved["optimizer"]["state"][i]["z"] for i in range(1, 6)])
    assert optimizer.param_groups[1]["lr"] == 0.5
    before = optimizer.stats()["loss"]
    advance(optimizer, net, x, y, 3)  # on ways of its own, as its systems are not averaged any more
    assert optimizer.stats()["loss"] < before and optimizer.stats()["skipped_steps"] == 0


@pytest.mark.parametrize("how", ["state_dict", "pickled whole"])
def test_training_goes_on_from_fewer_scalars(with_eleven_scalars: dict[str, Any], how: str) -> None:
    saved = with_eleven_scalars
    former = copy.deepcopy(saved["optimizer"]["state"])
    net, optimizer, x, y = two_groups()
    if how == "state_dict":
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        left = saved["optimizer"]["state"][1]
        assert left.keys() == former[1].keys() and left["scalars"].shape == (FORMER,)  # the caller's own is left alone
    else:
        net, optimizer = pickle.loads(saved["pickled"])
    trained = [p for p in net.parameters() if p.requires_grad]
    assert_taken_over(optimizer.state[trained[0]], former[1])
    torch.set_rng_state(saved["rng"])
    advance(optimizer, net, x, y, 3)
    z = [optimizer.state[p]["z"] for p in trained]
    ours = [*net.state_dict().values(), *z, *optimizer.stats().values()]
    for a, b in zip(ours, saved["after"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # another processor may round differently
    assert optimizer.history()["loss"].shape == (7,)
