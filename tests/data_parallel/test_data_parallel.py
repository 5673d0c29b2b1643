"""Replicas in several processes take the step that one process takes of the whole batch, and stay equal bit for bit."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from tests.helpers.replicas import (
    BATCH,
    CASES,
    HOW,
    OPTIONS,
    SPLITS,
    STEPS,
    batch,
    flat_parts,
    net,
    parts,
    results,
    train_until,
    weights_of,
)


@functools.cache
def of_two() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return results(2, Path(folder), list(CASES))


def found(case: str) -> list[Any]:
    own = [each[case] for each in of_two()]
    errors = [each for each in own if isinstance(each, str) and "Traceback" in each]
    assert not errors, errors[0]
    return own


@functools.cache
def in_one(options: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Weights, losses and stats of one process with the whole batch."""
    model = net()
    optimizer = CurveBall(model.parameters(), **OPTIONS[options])
    losses = [optimizer.step(*parts(model, step, [BATCH])[0])[0] for step in range(STEPS)]
    return weights_of(model), torch.stack(losses).double(), optimizer.stats()


def assert_as_in_one(each: list[dict[str, Any]], options: str) -> None:
    weights, losses, stats = in_one(options)
    for own in each:
        assert torch.equal(own["numbers"], each[0]["numbers"]), "the replicas are not equal"
        torch.testing.assert_close(own["weights"], weights, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(own["losses"], losses, rtol=1e-9, atol=1e-10)
        for name in ("beta", "rho", "lambd", "ratio", "predicted_change"):
            torch.testing.assert_close(own["stats"][name], stats[name], rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("how", HOW)
def test_two_processes_are_as_one(how: str, options: str, split: str) -> None:
    assert_as_in_one(found(f"{how}, {options}, {split}"), options)


@pytest.mark.slow
def test_four_processes_are_as_one(tmp_path: Path) -> None:
    names = [f"{how}, {options}, {split}" for how in HOW for options in ("published", "metric") for split in SPLITS]
    each = results(4, tmp_path, names)
    for name in names:
        assert_as_in_one([own[name] for own in each], name.split(", ")[1])


def test_sums_are_on_their_way_while_the_backward_pass_runs() -> None:
    assert all(own["overlap"] and own["method"] == "linearize" for own in found("wrapped, published, even"))


def test_one_gradient_is_sent_in_a_step() -> None:
    """And 24 numbers at most: the weights, the system, the guard's sums, and a loss."""
    gradient = 8 * sum(p.numel() for p in net().parameters())
    for options in OPTIONS:
        sent = float(found(f"process_group, {options}, even")[0]["stats"]["sent_bytes"])
        assert gradient < sent <= gradient + 24 * 8, options


def test_a_curvature_is_missing_where_the_whole_has_none() -> None:
    first, second = found("without_curvature")
    cases = [(alone, options) for alone in (False, True) for options in ("published", "gradient", "metric, residual")]
    for (alone, options), own, other in zip(cases, first, second, strict=True):
        assert torch.equal(own["numbers"], other["numbers"]), "the replicas are not equal"
        assert len(own["said"]) == len(other["said"]) == (0 if alone else 1)
        model = net()
        optimizer = CurveBall(model.parameters(), **OPTIONS[options])
        for step in range(STEPS):
            given = flat_parts(model, step, (5, 7), alone)
            whole = as_one(given, (5, 7))
            more = dict(curvature_batch=whole) if step >= STEPS - 2 else {}
            optimizer.step(*whole, **more)
        torch.testing.assert_close(own["weights"], weights_of(model), rtol=1e-7, atol=1e-9)


def as_one(given: list[Any], split: tuple[int, ...]) -> tuple[Any, Any]:
    def loss_fn(out: Tensor) -> Tensor:
        losses = [f(o) * len(o) for (_, f), o in zip(given, out.split(split))]
        return torch.stack(losses).sum() / len(out)

    return lambda: torch.cat([f() for f, _ in given]), loss_fn


def test_a_process_that_has_run_out_goes_on_at_the_weight_zero() -> None:
    for weights in found("one_weight_zero"):
        torch.testing.assert_close(weights, in_one("metric")[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("how", HOW)
def test_buffers_are_those_of_the_first_process(how: str) -> None:
    """One process with two nets over the same weights, each with statistics of its own batch, does the same."""
    first, second = net("batch norm"), net("batch norm")
    for (_, a), b in zip(first.named_modules(), second.modules()):
        for name, p in a.named_parameters(recurse=False):
            setattr(b, name, p)
    optimizer = CurveBall(first.parameters(), **OPTIONS["metric"])
    for step in range(STEPS):
        (one, _), (_, _) = parts(first, step, (6, 6))
        two, y = parts(second, step, (6, 6))[1][0], batch(step)[1]
        optimizer.step(lambda one=one, two=two: torch.cat((one(), two())), lambda out, y=y: F.cross_entropy(out, y))
        second.load_state_dict(first.state_dict())
    for (weights,) in found(f"buffers, {how}"):
        torch.testing.assert_close(weights, weights_of(first), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["bfloat16 weights", "float16 weights", "autocast"])
def test_half_precision(kind: str) -> None:
    (numbers, loss), (others, _) = found(f"half, {kind}")
    assert torch.equal(numbers, others)
    assert float(loss) == pytest.approx(float(in_one("published")[1][-1]), rel=0.02)


def test_parameters_that_a_process_does_not_use() -> None:
    weights, others = found("unused")
    assert torch.equal(weights, others) and not bool((weights[-3:] == 1).any())


def test_replicas_that_do_not_begin_alike_are_refused() -> None:
    for said in found("unlike"):
        assert said.startswith("True: the processes have different parameters"), said


def test_each_process_takes_a_method_that_its_model_allows() -> None:
    assert torch.equal(*found("other_methods"))


def test_the_wrapper_serves_ordinary_training_as_before() -> None:
    for with_steps, without in found("beside_ordinary_training"):
        assert torch.equal(with_steps, without)


def test_join_is_refused_with_what_to_do() -> None:
    for said in found("in_join"):
        assert "does not take part in join()" in said and "weights=[0.0]" in said


def test_a_curvature_batch_is_that_of_all_processes() -> None:
    first, second = found("curvature_batch")
    assert torch.equal(first, second)
    model = net()
    optimizer = CurveBall(model.parameters(), lambd=0.4)
    for step in range(STEPS):
        x, y = batch(step)
        some = torch.tensor([0, 1, 2, 6, 7, 8])
        part = (lambda x=x[some]: model(x), lambda out, y=y[some]: F.cross_entropy(out, y))
        optimizer.step(*parts(model, step, [BATCH])[0], curvature_batch=part)
    weights = weights_of(model)
    torch.testing.assert_close(first[: len(weights)], weights, rtol=1e-8, atol=1e-9)


def test_debug_changes_no_step() -> None:
    for plain, debug in found("with_debug"):
        assert torch.equal(plain, debug)


def test_a_model_in_two_wrappers() -> None:
    for weights in found("two_wrappers"):
        torch.testing.assert_close(weights, in_one("published")[0], rtol=1e-8, atol=1e-9)


def test_a_hook_sees_the_gradient_of_its_process() -> None:
    first, second = found("hooked")
    assert torch.equal(first, second)
    weights = weights_of(net())
    model = net()
    optimizer = CurveBall(model.parameters(), **OPTIONS["published"])
    next(model.parameters()).register_hook(lambda g: 0.5 * g)
    for step in range(STEPS):
        optimizer.step(*parts(model, step, [BATCH])[0])
    torch.testing.assert_close(first[: len(weights)], weights_of(model), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("case", ["hooked_in_one", "other_numbers_of_parts", "other_losses"])
def test_processes_that_are_not_alike_come_to_the_same_step(case: str) -> None:
    assert torch.equal(*found(case))


def test_a_hook_that_only_looks_changes_no_step() -> None:
    weights = in_one("published")[0]
    torch.testing.assert_close(found("hooked_in_one")[0][: len(weights)], weights, rtol=1e-8, atol=1e-9)


def test_buffers_that_a_process_has_not_called_are_not_mistaken_for_others() -> None:
    (numbers, unused), (others, _) = found("branches")
    assert torch.equal(numbers, others) and not bool(unused.any())


def until(world: int, folder: Path, first: int, last: int, killed: int = -1) -> Callable[[], None]:
    context = mp.get_context("spawn")
    each = [
        context.Process(target=train_until, args=(r, world, str(folder), first, last, killed)) for r in range(world)
    ]
    for process in each:
        process.start()

    def wait() -> None:
        for process in each:
            process.join(120)
            assert process.exitcode is not None, "a process waits for one that is gone"

    return wait


def test_a_killed_process_ends_the_others_and_training_resumes_with_another_number(tmp_path: Path) -> None:
    begin = time.monotonic()
    until(2, tmp_path, 0, STEPS, killed=4)()
    assert "a process of the group has ended" in (tmp_path / "error0").read_text()
    assert time.monotonic() - begin < 100 and not (tmp_path / "end.pt").exists()
    (tmp_path / "meet").unlink()
    step = torch.load(tmp_path / "checkpoint.pt")["step"]
    assert step == 3
    until(1, tmp_path, step, STEPS)()
    torch.testing.assert_close(torch.load(tmp_path / "end.pt"), in_one("metric")[0], rtol=1e-8, atol=1e-9)


def test_several_processes_without_a_word_are_warned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    try:
        model, other = nn.Linear(3, 2), nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
        optimizer = CurveBall(model.parameters())
        with pytest.warns(UserWarning, match="right if each has a model to itself") as caught:
            for _ in range(3):
                optimizer.step(lambda: model(torch.ones(4, 3)), lambda out: out.square().sum())
        assert len(caught) == 1 and other
        with pytest.raises(RuntimeError, match="a DistributedDataParallel-wrapped module without a parameter of this"):
            optimizer.step(lambda: model(torch.ones(1, 3)) + other(torch.ones(1, 3)), lambda out: out.square().sum())
        with pytest.raises(RuntimeError, match="calls SyncBatchNorm"):
            norm = nn.SyncBatchNorm(3)
            CurveBall(norm.parameters()).step(lambda: norm(torch.ones(4, 3)), lambda out: out.square().sum())
    finally:
        torch.distributed.destroy_process_group()


def test_a_process_group_must_be_one() -> None:
    with pytest.raises(TypeError, match=r"torch.distributed.group.WORLD after init_process_group\(\); got str"):
        CurveBall(nn.Linear(2, 2).parameters(), process_group="world")  # type: ignore[arg-type]


def test_what_was_sent_last_outlives_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo's threads let go of it later, and must not be the last to do so in a process that ends."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    sent: list[weakref.ref[Tensor]] = []
    for name in ("all_reduce", "broadcast"):
        original = getattr(torch.distributed, name)

        def watched(t: Tensor, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            sent.append(weakref.ref(t))
            return original(t, *args, **kwargs)

        monkeypatch.setattr(torch.distributed, name, watched)
    try:
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        optimizer = CurveBall(model.parameters(), process_group=torch.distributed.group.WORLD)
        for _ in range(2):
            optimizer.step(lambda: model(torch.randn(4, 3)), lambda out: out.square().sum())
            assert sent[-1]() is not None  # the buffers
        optimizer.check_replicas()
        del optimizer
        gc.collect()
        assert sent[-1]() is not None and sum(each() is not None for each in sent) == 1
    finally:
        torch.distributed.destroy_process_group()


def test_a_copy_has_the_same_process_group(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        model = nn.Linear(3, 2)
        optimizer = CurveBall(model.parameters(), process_group=group)
        optimizer.step(lambda: model(torch.ones(4, 3)), lambda out: out.square().sum())
        copied_model, copied = copy.deepcopy((model, optimizer))
        again = copy.deepcopy(copied)
        losses = []
        for net, own in ((model, optimizer), (copied_model, copied)):
            losses.append(own.step(lambda net=net: net(torch.ones(4, 3)), lambda out: out.square().sum())[0])
            assert "sent_bytes" in own.stats()
        assert torch.equal(*losses)
        assert all(each._process_group is group for each in (copied, again, copy.copy(optimizer)))
        with pytest.raises(TypeError, match=r"process_group= cannot be pickled.*state_dict\(\)"):
            pickle.dumps(optimizer)
        with pytest.raises(TypeError, match="process_group= cannot be pickled"):
            torch.save(optimizer, tmp_path / "whole.pt")
        pickle.loads(pickle.dumps(CurveBall(model.parameters())))
    finally:
        torch.distributed.destroy_process_group()
