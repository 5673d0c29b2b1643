"""What each process of a group does in the tests of data-parallel training."""

from __future__ import annotations

import copy
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from curveball_fused import CurveBall, user_warnings

OPTIONS: dict[str, dict[str, Any]] = {
    "published": dict(lr=0.8, lambd=0.6, weight_decay=0.02, lambda_interval=2, lambda_factor=0.9),
    "gradient": dict(lambd=0.5, direction="gradient", solve_interval=3, average=0.4, lambda_interval=1),
    "metric": dict(preconditioner="kronecker", lambd=20.0, solve_interval=3, lambda_interval=1, weight_decay=1e-3),
    "metric, residual": dict(preconditioner="kronecker", direction="residual", lambd=20.0, lr=0.9),
    "double backward": dict(curvature="double_backward", lambd=0.6),
}
STEPS = 8
BATCH = 12
SPLITS = {"even": (3, 3, 3, 3), "uneven": (5, 2, 4, 1)}
HOW = ("wrapped", "process_group")


def net(kind: str = "plain", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    between = {"batch norm": nn.BatchNorm1d(8), "dropout": nn.Dropout(0.3)}.get(kind, nn.Identity())
    return nn.Sequential(nn.Linear(5, 8, bias=False), between, nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 5, dtype=torch.float64, generator=generator).to(dtype)
    return x, torch.randint(3, (BATCH,), generator=generator)


def parts(model: nn.Module, step: int, split: Sequence[int], dtype: torch.dtype = torch.float64) -> list[Any]:
    x, y = batch(step, dtype)
    return [
        (lambda x_i=x_i: model(x_i), lambda out, y_i=y_i: F.cross_entropy(out, y_i))
        for x_i, y_i in zip(x.split(split), y.split(split))
    ]


def optimizer_of(model: nn.Module, how: str, options: dict[str, Any]) -> tuple[nn.Module, CurveBall]:
    """The model as it is called, and its optimizer."""
    if how == "wrapped":
        return DistributedDataParallel(model), CurveBall(model.parameters(), **options)
    return model, CurveBall(model.parameters(), process_group=dist.group.WORLD, **options)


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([t.detach().double().flatten().cpu() for t in model.state_dict().values()])


def numbers_of(model: nn.Module, optimizer: CurveBall) -> Tensor:
    """Everything that must be equal in all processes."""
    states = [sorted(optimizer.state[p].items()) for p in model.parameters()]
    own = [t.double().flatten().cpu() for each in states for name, t in each if name != "method"]
    return torch.cat([weights_of(model), *own])


def trained(rank: int, world: int, how: str, options: str, split: str, **more: Any) -> dict[str, Any]:
    """Train on each process's parts of every batch."""
    model = net(**more)
    called, optimizer = optimizer_of(model, how, OPTIONS[options])
    losses = []
    for step in range(STEPS):
        own = parts(called, step, SPLITS[split])[rank::world]
        losses.append(optimizer.step(own)[0] if len(own) > 1 else optimizer.step(*own[0])[0])
    optimizer.check_replicas()
    assert optimizer._shared is not None
    return dict(
        method=optimizer._shared["method"],
        weights=weights_of(model), losses=torch.stack(losses).double(), numbers=numbers_of(model, optimizer),
        stats=optimizer.stats(), overlap=optimizer._processes.may_overlap,
    )  # fmt: skip


def one_weight_zero(rank: int, world: int) -> Tensor:
    """A process that has run out of batches goes on with any at the weight zero."""
    model = net()
    called, optimizer = optimizer_of(model, "wrapped", OPTIONS["metric"])
    for step in range(STEPS):
        own = parts(called, step if rank == 0 else 99, [BATCH])
        optimizer.step(own, weights=[float(rank == 0)])
    return weights_of(model)


def buffers(rank: int, world: int, how: str) -> list[Tensor]:
    """Batch norm: statistics of each process's own batch, of which those of the first are kept."""
    model = net("batch norm")
    called, optimizer = optimizer_of(model, how, OPTIONS["metric"])
    for step in range(STEPS):
        optimizer.step(*parts(called, step, (6, 6))[rank])
    assert optimizer._shared is not None and optimizer._shared["method"] == "linearize"
    return [weights_of(model)]


def half(rank: int, world: int, kind: str) -> tuple[Tensor, Tensor]:
    dtype = {"bfloat16 weights": torch.bfloat16, "float16 weights": torch.float16}.get(kind, torch.float32)
    model = net(dtype=dtype)
    called, optimizer = optimizer_of(model, "wrapped", OPTIONS["published"])
    autocast = torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else nullcontext()
    for step in range(STEPS):
        with autocast:
            loss, _ = optimizer.step(*parts(called, step, (6, 6), dtype)[rank])
    return numbers_of(model, optimizer), loss


def unused(rank: int, world: int) -> Tensor:
    """A parameter that each process uses in other steps."""
    model = net()
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = CurveBall([*model.parameters(), extra], process_group=dist.group.WORLD, lambd=0.5)
    for step in range(STEPS):
        (first, loss), (second, other) = parts(model, step, (6, 6))
        mine = (first, loss) if rank == 0 else ((lambda: second() * extra) if step % 2 else second, other)
        optimizer.step(*mine)
    return torch.cat((weights_of(model), extra.detach()))


def unlike(rank: int, world: int) -> str:
    """Replicas that do not begin alike."""
    torch.manual_seed(rank)
    model = nn.Linear(5, 3).double()
    before = weights_of(model)
    optimizer = CurveBall(model.parameters(), process_group=dist.group.WORLD)
    try:
        optimizer.step(*parts(model, 0, (6, 6))[rank])
    except RuntimeError as error:
        return f"{torch.equal(before, weights_of(model))}: {error}"
    return "no error"


class Square(torch.autograd.Function):
    """Without a tangent: left to double backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


def other_methods(rank: int, world: int) -> Tensor:
    """One process's model can be followed by fewer methods: each takes its own."""
    model = net()
    called, optimizer = optimizer_of(model, "wrapped", OPTIONS["published"])
    for step in range(3):
        model_fn, loss_fn = parts(called, step, (6, 6))[rank]
        optimizer.step((lambda: Square.apply(model_fn())) if rank else model_fn, loss_fn)
    return numbers_of(model, optimizer)


def beside_ordinary_training(rank: int, world: int) -> list[Tensor]:
    """The wrapper serves an ordinary backward pass before and after a step, as if there had been none."""
    found = []
    for with_steps in (True, False):
        model = net()
        called, optimizer = optimizer_of(model, "wrapped", dict(lambd=0.5))
        for step in range(2):
            if with_steps:
                before = copy.deepcopy(model.state_dict())
                optimizer.step(*parts(called, step, (6, 6))[rank])
                model.load_state_dict(before)
            model_fn, loss_fn = parts(called, step, (6, 6))[rank]
            model.zero_grad()
            loss_fn(model_fn()).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return found


def in_join(rank: int, world: int) -> str:
    model = net()
    called, optimizer = optimizer_of(model, "wrapped", {})
    try:
        with called.join(enable=True):
            optimizer.step(*parts(called, 0, (6, 6))[rank])
    except RuntimeError as error:
        return str(error)
    return "no error"


def without_curvature(rank: int, world: int) -> list[dict[str, Any]]:
    """A loss without curvature in both processes, or in the first one alone; in the last two steps with another's."""
    found = []
    for alone in (False, True):
        for options in ("published", "gradient", "metric, residual"):
            model = net()
            called, optimizer = optimizer_of(model, "wrapped", OPTIONS[options])
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                for step in range(STEPS):
                    model_fn, loss_fn = flat_parts(called, step, (5, 7), alone)[rank]
                    more = dict(curvature_batch=(model_fn, loss_fn)) if step >= STEPS - 2 else {}
                    optimizer.step([(model_fn, loss_fn)], weights=[(5.0, 7.0)[rank]], **more)
            user_warnings.announced.clear()
            said = [str(w.message) for w in told if "no curvature" in str(w.message)]
            found.append(dict(numbers=numbers_of(model, optimizer), weights=weights_of(model), said=said))
    return found


def flat_parts(model: nn.Module, step: int, split: Sequence[int], alone: bool) -> list[Any]:
    def loss_of(i: int, y: Tensor) -> Callable[[Tensor], Tensor]:
        target = F.one_hot(y, 3).double()
        return lambda out: F.mse_loss(out, target) if i and alone else F.l1_loss(out, target)

    x, y = batch(step)
    return [
        (lambda x_i=x_i: model(x_i), loss_of(i, y_i))
        for i, (x_i, y_i) in enumerate(zip(x.split(split), y.split(split)))
    ]


def curvature_batch(rank: int, world: int) -> Tensor:
    model = net()
    called, optimizer = optimizer_of(model, "wrapped", dict(lambd=0.4))
    for step in range(STEPS):
        optimizer.step(*parts(called, step, (6, 6))[rank], curvature_batch=parts(called, step, (3, 3, 3, 3))[2 * rank])
    return numbers_of(model, optimizer)


def with_debug(rank: int, world: int) -> list[Tensor]:
    found = []
    for debug in (False, True):
        model = net()
        called, optimizer = optimizer_of(model, "wrapped", dict(OPTIONS["metric"], debug=debug))
        for step in range(4):
            optimizer.step(*parts(called, step, (6, 6))[rank])
        found.append(numbers_of(model, optimizer))
    return found


def two_wrappers(rank: int, world: int) -> Tensor:
    model = net()
    assert isinstance(model, nn.Sequential)
    first, second = DistributedDataParallel(model[:3]), DistributedDataParallel(model[3:])
    optimizer = CurveBall(model.parameters(), **OPTIONS["published"])
    for step in range(STEPS):
        optimizer.step(*parts(nn.Sequential(first, second), step, (6, 6))[rank])
    return weights_of(model)


def hooked(rank: int, world: int) -> Tensor:
    """A hook that alters a gradient alters that of its process before the sum, as in DistributedDataParallel."""
    model = net()
    called, optimizer = optimizer_of(model, "wrapped", OPTIONS["published"])
    next(model.parameters()).register_hook(lambda g: 0.5 * g)
    for step in range(STEPS):
        optimizer.step(*parts(called, step, (6, 6))[rank])
    return numbers_of(model, optimizer)


def hooked_in_one(rank: int, world: int) -> Tensor:
    """A hook that only looks, in one process, as those of loggers."""
    model = net()
    called, optimizer = optimizer_of(model, "wrapped", OPTIONS["published"])
    if rank == 0:
        next(model.parameters()).register_hook(lambda g: None)
    for step in range(STEPS):
        optimizer.step(*parts(called, step, (6, 6))[rank])
    return numbers_of(model, optimizer)


def other_numbers_of_parts(rank: int, world: int) -> Tensor:
    """Of gradients in bfloat16, summed up in float32 where there are several parts."""
    model = net(dtype=torch.bfloat16)
    called, optimizer = optimizer_of(model, "wrapped", OPTIONS["published"])
    for step in range(4):
        own = parts(called, step, (6, 3, 3), torch.bfloat16)
        optimizer.step(own[:1] if rank == 0 else own[1:])
    return numbers_of(model, optimizer)


class Branches(nn.Module):
    """Runs through one batch norm or another, as its input says."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm1d(5), nn.BatchNorm1d(5)])
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        norm: nn.Module = self.norms[int(len(x) > 5)]
        return cast(Tensor, self.last(norm(x)))


def branches(rank: int, world: int) -> list[Tensor]:
    """What a process calls inside of a model may depend on its batch; the statistics of the first one count."""
    torch.manual_seed(1)
    model = Branches().double()
    called, optimizer = optimizer_of(model, "process_group", dict(lambd=0.5))
    x, y = batch(0)
    x, y = (t.split((5, 7))[rank] for t in (x, y))
    optimizer.step(lambda: called(x), lambda out: F.cross_entropy(out, y))
    unused = cast(nn.BatchNorm1d, model.norms[1]).running_mean
    return [numbers_of(model, optimizer), cast(Tensor, unused)]


def other_losses(rank: int, world: int) -> Tensor:
    """A loss that is not convex in one process bounds the steps of all."""
    model = net()
    called, optimizer = optimizer_of(model, "wrapped", dict(lambd=1e-6, lambda_interval=100))
    for step in range(3):
        model_fn, loss_fn = parts(called, step, (6, 6))[rank]
        optimizer.step(model_fn, (lambda out: -(out - 3).square().sum()) if rank else loss_fn)
    assert optimizer.stats()["safe_steps"] > 0
    return numbers_of(model, optimizer)


CASES: dict[str, Callable[[int, int], Any]] = {
    **{
        f"{how}, {options}, {split}": lambda rank, world, a=(how, options, split): trained(rank, world, *a)
        for how in HOW
        for options in OPTIONS
        for split in SPLITS
    },
    **{f"buffers, {how}": lambda rank, world, how=how: buffers(rank, world, how) for how in HOW},
    **{
        f"half, {kind}": lambda rank, world, kind=kind: half(rank, world, kind)
        for kind in ("bfloat16 weights", "float16 weights", "autocast")
    },
    **{
        f.__name__: f
        for f in (
            one_weight_zero, unused, unlike, other_methods, beside_ordinary_training, in_join,
            without_curvature, curvature_batch, with_debug, two_wrappers, hooked, hooked_in_one,
            other_numbers_of_parts, branches, other_losses,
        )
    },
}  # fmt: skip


def join_group(rank: int, world: int, folder: str, seconds: float = 60) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=meet, timeout=timedelta(seconds=seconds))


def run_cases(rank: int, world: int, folder: str, names: Sequence[str]) -> None:
    """Run cases one after the other, and leave what they return, or the error, in a file of this process."""
    join_group(rank, world, folder)
    found = {}
    for name in names:
        try:
            found[name] = CASES[name](rank, world)
        except Exception:
            found[name] = traceback.format_exc()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def results(world: int, folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """What each of several processes has found."""
    mp.spawn(run_cases, (world, str(folder), names), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def train_until(rank: int, world: int, folder: str, first: int, last: int, killed: int) -> None:
    """Train from the last checkpoint to step `last`; `killed` (of rank 1) is the step in which it is killed."""
    join_group(rank, world, folder, seconds=20)
    model = net()
    called, optimizer = optimizer_of(model, "wrapped", OPTIONS["metric"])
    if first:
        saved = torch.load(f"{folder}/checkpoint.pt")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    try:
        for step in range(first, last):
            own = parts(called, step, (3, 3, 3, 3))[rank::world]
            if rank == 1 and step == killed:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step(own)
            if rank == 0 and step % 3 == 2:  # written beside, then put in place: a reader finds the old or the new one
                torch.save(
                    {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
                    f"{folder}/new.pt",
                )
                os.replace(f"{folder}/new.pt", f"{folder}/checkpoint.pt")
    except RuntimeError as error:
        Path(f"{folder}/error{rank}").write_text(f"{type(error).__name__}: {error}")
        sys.exit(1)
    if rank == 0:
        torch.save(weights_of(model), f"{folder}/end.pt")
    dist.destroy_process_group()
