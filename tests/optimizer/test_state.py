"""State is tensors under parameters, made by the constructor, so that torch's own tools can save, load and move it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from curveball_fused import CurveBall, state
from curveball_fused.backends.scalars import LAMBD
from curveball_fused.curvature import METHODS
from tests.helpers.tiers import slow
from tests.helpers.training import SETTINGS, assert_equal

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(3))
Y = torch.arange(12) % 3
BOTH = ["before a step", "after three"]


class Net(nn.Module):
    """Batch norm, dropout, a tied weight, a frozen parameter, one without elements; perhaps in half precision."""

    def __init__(self, dtype: torch.dtype = torch.float32, autocast: bool = False) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)  # the first one
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6)
        self.third.weight = self.second.weight
        self.empty = nn.ParameterList([torch.empty(0, 3)])
        self.last = nn.Linear(6, 3)
        self.autocast = autocast
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=self.autocast):
            h = F.dropout(self.norm(self.first(x * self.frozen)).tanh(), 0.1)
            return self.last(self.third(self.second(h).tanh())) + self.empty[0].sum()


MAKERS: dict[str, Callable[[], tuple[Net, CurveBall]]] = {}


def case(make: Callable[[], tuple[Net, CurveBall]]) -> Callable[[], tuple[Net, CurveBall]]:
    MAKERS[make.__name__] = make
    return make


@case
def one_group() -> tuple[Net, CurveBall]:
    net = Net()
    return net, CurveBall(net.parameters(), **SETTINGS)


@case
def two_groups_and_averages() -> tuple[Net, CurveBall]:
    net = Net()
    ours = [net.last.weight, net.last.bias]
    rest = [p for p in net.parameters() if all(p is not q for q in ours)]
    groups = [dict(params=rest), dict(params=ours, lr=torch.tensor(0.3), weight_decay=0.1)]
    return net, CurveBall(groups, average=0.7, direction="gradient", solve_interval=2, lambd=0.4)


@case
def kronecker() -> tuple[Net, CurveBall]:
    net = Net()
    return net, CurveBall(net.parameters(), preconditioner="kronecker", solve_interval=2, lambd=30.0)


@case
def bfloat16_parameters() -> tuple[Net, CurveBall]:
    net = Net(torch.bfloat16)
    return net, CurveBall(net.parameters(), lr=torch.tensor(0.7), lambd=3.0)


@case
def float16_inside() -> tuple[Net, CurveBall]:
    net = Net(autocast=True)
    return net, CurveBall(net.parameters(), lambd=2.0)


@case
def named_parameters() -> tuple[Net, CurveBall]:
    net = Net()
    return net, CurveBall(net.named_parameters(), backend="torch", maximize=False, curvature="forward")


def made(maker: str, seed: int = 0) -> tuple[Net, CurveBall]:
    torch.manual_seed(seed)
    return MAKERS[maker]()


def train(net: Net, optimizer: CurveBall, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.step(lambda: net(X.to(net.last.weight.dtype)), lambda out: F.cross_entropy(out, Y))


def assert_same_training(one: tuple[Net, CurveBall], other: tuple[Net, CurveBall]) -> None:
    ends = []
    for net, optimizer in (one, other):
        torch.manual_seed(4)
        train(net, optimizer, 4)
        z = [optimizer.state[p]["z"] for p in net.parameters() if p.requires_grad]
        ends.append([*net.state_dict().values(), *z, *optimizer.stats().values(), *optimizer.history().values()])
    assert_equal(*ends)


def through_state_dict(net: Net, optimizer: CurveBall, twin: Net, other: CurveBall, _: Path) -> Any:
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(optimizer.state_dict())


def through_torch_save(net: Net, optimizer: CurveBall, twin: Net, other: CurveBall, _: Path) -> Any:
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    twin.load_state_dict(weights)
    other.load_state_dict(saved)


def through_named_state(options: StateDictOptions) -> Callable[..., None]:
    def through(net: Net, optimizer: CurveBall, twin: Net, other: CurveBall, _: Path) -> None:
        weights, saved = copy.deepcopy(get_state_dict(net, optimizer, options=options))
        set_state_dict(twin, other, model_state_dict=weights, optim_state_dict=saved, options=options)

    return through


def through_folder(options: StateDictOptions) -> Callable[..., None]:
    def through(net: Net, optimizer: CurveBall, twin: Net, other: CurveBall, folder: Path) -> None:
        weights, saved = get_state_dict(net, optimizer, options=options)
        dcp.save(dict(net=weights, optimizer=saved), checkpoint_id=folder, no_dist=True)
        weights, saved = get_state_dict(twin, other, options=options)
        loaded = dict(net=weights, optimizer=saved)
        dcp.load(loaded, checkpoint_id=folder, no_dist=True)
        set_state_dict(
            twin, other, model_state_dict=loaded["net"], optim_state_dict=loaded["optimizer"], options=options
        )

    return through


PLAIN, FLAT = StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)
WAYS: dict[str, Callable[..., None]] = {
    "state_dict": through_state_dict,
    "torch.save": through_torch_save,
    "by name": through_named_state(PLAIN),
    "by name, flat": through_named_state(FLAT),
    "by name, on the CPU": through_named_state(StateDictOptions(full_state_dict=True, cpu_offload=True)),
    "folder": through_folder(PLAIN),
    "folder, flat": through_folder(FLAT),
}


RESUMED: list[Any] = [
    (way, maker) if way == "by name, flat" or maker == "two_groups_and_averages" else slow(way, maker)
    for way in WAYS
    for maker in MAKERS
]


@pytest.mark.parametrize("when", BOTH)
@pytest.mark.parametrize(("way", "maker"), RESUMED)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_resumes_bit_for_bit(way: str, maker: str, when: str, tmp_path: Path) -> None:
    net, optimizer = made(maker)
    train(net, optimizer, 0 if when == BOTH[0] else 3)
    twin, other = made(maker, seed=1)
    WAYS[way](net, optimizer, twin, other, tmp_path / "checkpoint")
    assert_same_training((net, optimizer), (twin, other))


@pytest.mark.parametrize("when", BOTH)
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("how", ["deepcopy", "optimizer alone", "pickle"])
def test_a_copy_goes_the_same_way(how: str, maker: str, when: str) -> None:
    net, optimizer = made(maker)
    train(net, optimizer, 0 if when == BOTH[0] else 3)
    if how == "pickle":
        file = io.BytesIO()
        torch.save((net, optimizer), file)
        file.seek(0)
        twin, other = torch.load(file, weights_only=False)
    elif how == "deepcopy":
        twin, other = copy.deepcopy((net, optimizer))
    else:  # which brings parameters of its own: as a store to load from
        twin, other = made(maker, seed=1)
        twin.load_state_dict(net.state_dict())
        other.load_state_dict(copy.deepcopy(optimizer).state_dict())
    assert_same_training((net, optimizer), (twin, other))


@pytest.mark.parametrize("maker", MAKERS)
def test_state_is_tensors_under_the_parameters_that_are_trained(maker: str) -> None:
    net, optimizer = made(maker)
    for _ in range(2):
        assert set(optimizer.state) == {p for p in net.parameters() if p.requires_grad}
        for p, entry in optimizer.state.items():
            assert entry["z"].shape == p.shape and entry["z"].dtype == torch.float32
            assert all(isinstance(name, str) and isinstance(value, Tensor) for name, value in entry.items())
        train(net, optimizer)


def test_reading_the_state_before_a_step_changes_nothing() -> None:
    net, optimizer = made("one_group")
    get_optimizer_state_dict(net, optimizer)
    assert all(group["lr"] == SETTINGS["lr"] for group in optimizer.param_groups)
    assert all(p.grad is None for p in net.parameters())


def test_a_parameter_that_requires_a_gradient_later_has_its_state_in_a_checkpoint() -> None:
    net, optimizer = made("one_group")
    train(net, optimizer)
    net.frozen.requires_grad_(True)
    twin, other = made("one_group", seed=1)
    twin.frozen.requires_grad_(True)
    through_named_state(PLAIN)(net, optimizer, twin, other, Path())
    assert "scalars" in optimizer.state[net.frozen]  # the first that is trained
    assert_same_training((net, optimizer), (twin, other))


@pytest.mark.parametrize("options", [PLAIN, FLAT])
def test_a_parameter_frozen_after_the_last_step_does_not_take_the_numbers_of_all_with_it(
    options: StateDictOptions,
) -> None:
    net, optimizer = made("one_group")
    train(net, optimizer)
    twin, _ = made("one_group", seed=1)
    for model in (net, twin):
        model.first.weight.requires_grad_(False)
    other = CurveBall(twin.parameters())
    through_named_state(options)(net, optimizer, twin, other, Path())
    assert_same_training((net, optimizer), (twin, other))


def test_a_checkpoint_by_name_of_other_frozen_parameters_is_refused() -> None:
    net, optimizer = made("one_group")
    train(net, optimizer)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    twin, other = made("one_group", seed=1)
    twin.first.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="freeze the same parameters"):
        set_optimizer_state_dict(twin, other, saved)


def test_added_group_has_state_at_once() -> None:
    net = Net()
    optimizer = CurveBall(net.first.parameters())
    train(net, optimizer, 2)
    optimizer.add_param_group(dict(params=net.last.parameters()))
    assert all("z" in optimizer.state[p] for p in net.last.parameters())
    assert not any("scalars" in optimizer.state[p] for p in net.last.parameters())
    before = len(optimizer.state)
    with pytest.raises(TypeError):
        optimizer.add_param_group(dict(params=[nn.Parameter(torch.zeros(2, dtype=torch.complex64))]))
    assert len(optimizer.state) == before and len(optimizer.param_groups) == 2


def test_hooks_of_checkpoints_see_and_change_what_is_saved_and_loaded() -> None:
    net, optimizer = made("bfloat16_parameters")
    train(net, optimizer)
    seen: list[str] = []

    def changed(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        entries = {key: {name: t.clone() for name, t in entry.items()} for key, entry in given["state"].items()}
        for entry in entries.values():
            entry["z"] *= 2
        return given | {"state": entries}

    def loaded(other: Any) -> None:
        p = other.param_groups[0]["params"][1]
        assert other.state[p]["z"].dtype == torch.float32
        assert torch.equal(other.state[p]["z"], 4 * optimizer.state[net.first.weight]["z"])
        seen.append("loaded")

    optimizer.register_state_dict_pre_hook(lambda _: seen.append("saving"))
    optimizer.register_state_dict_post_hook(changed)
    _, other = made("bfloat16_parameters", seed=1)
    other.register_load_state_dict_pre_hook(changed)
    other.register_load_state_dict_post_hook(loaded)
    other.load_state_dict(optimizer.state_dict())
    assert seen == ["saving", "loaded"]


def test_what_was_loaded_shares_nothing_with_the_dictionary() -> None:
    net, optimizer = made("one_group")
    train(net, optimizer)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    twin, other = made("one_group", seed=1)
    other.load_state_dict(saved)
    train(twin, other)
    for name, entry in before.items():
        assert_equal(list(entry.values()), list(saved["state"][name].values()))


@pytest.mark.parametrize("what", ["all tensors", "all but one number", "each state replaced"])
def test_a_loop_that_moves_the_state_does_no_harm(what: str) -> None:
    net, optimizer = made("one_group")
    train(net, optimizer)
    twin, other = copy.deepcopy((net, optimizer))
    for p, entry in list(optimizer.state.items()):
        for name, value in entry.items():
            if what == "all tensors" or (what == "all but one number" and name != "step"):
                entry[name] = value.clone()
        if what == "each state replaced":
            optimizer.state[p] = copy.deepcopy(entry)
    assert_same_training((net, optimizer), (twin, other))


def test_the_numbers_of_the_host_are_up_to_date_in_the_state() -> None:
    net, optimizer = made("float16_inside")
    entry = optimizer.state[net.first.weight]
    assert int(entry["step"]) == 0
    train(net, optimizer, 2)
    entry = optimizer.state[net.first.weight]
    assert int(entry["step"]) == 2
    read = state._read(entry)
    assert read["method"] == optimizer._current()["method"] and read["compute_dtype"] is torch.float16
    assert entry["scalars"] is optimizer._current()["scalars"]


def test_every_method_has_a_number_in_checkpoints() -> None:
    assert {*METHODS, None} == set(state._METHODS)


CHANGES: dict[str, Callable[[Net], Any]] = {
    "double": lambda net: net.double(),
    "half": lambda net: net.to(torch.bfloat16),
    "another shape": lambda net: (
        setattr(net.last.weight, "data", torch.ones(4, 6) / 3) or setattr(net.last.bias, "data", torch.zeros(4))
    ),
    "other strides": lambda net: setattr(net.first.weight, "data", net.first.weight.data.t().contiguous().t()),
}


@pytest.mark.parametrize("looked", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_before_the_first_step(change: str, looked: bool) -> None:
    """As an optimizer that was made afterwards; a checkpoint in between is that of the changed model."""
    net, optimizer = made("one_group")
    CHANGES[change](net)
    twin = copy.deepcopy(net)
    other = CurveBall(twin.parameters(), **SETTINGS)
    if looked:
        CurveBall(copy.deepcopy(net).parameters()).load_state_dict(optimizer.state_dict())
    assert_same_training((net, optimizer), (twin, other))
    z = [optimizer.state[p]["z"] for p in net.parameters() if p.requires_grad]
    assert [t.stride() for t in z] == [p.stride() for p in net.parameters() if p.requires_grad]


def test_a_lambda_that_changes_before_the_first_step() -> None:
    net, optimizer = made("one_group")
    optimizer.param_groups[0]["lambd"] = 3.0
    assert optimizer.stats()["lambd"] == 3.0
    train(net, optimizer, 1)
    assert 2.0 < optimizer._current()["scalars"][LAMBD] < 4.0


def test_an_optimizer_made_in_inference_mode() -> None:
    net = Net()
    with torch.inference_mode():
        optimizer = CurveBall(net.parameters())
        optimizer.state_dict()
    train(net, optimizer)


def test_a_lazy_module() -> None:
    net = nn.LazyLinear(3)
    optimizer = CurveBall(net.parameters())
    net(X)
    optimizer.step(lambda: net(X), lambda out: F.cross_entropy(out, Y))
    assert optimizer.state[net.weight]["z"].any()


def test_z_that_is_taken_away_begins_anew() -> None:
    """Also in z·z, by which β and ρ are those of an optimizer whose z was zeroed."""
    net, optimizer = made("one_group")
    train(net, optimizer)
    twin, other = copy.deepcopy((net, optimizer))
    del optimizer.state[net.last.weight]
    other.state[twin.last.weight]["z"].zero_()
    other._shared["active"] = -1  # of none, so that z·z is summed anew
    assert_same_training((net, optimizer), (twin, other))
