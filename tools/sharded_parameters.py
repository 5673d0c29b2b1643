"""What of a step works on sharded weights, tried by two processes with gloo: `python tools/sharded_parameters.py`.

For each way to shard and each method of linearizing, the products Jv and Jᵀu are compared with those of the same net in
one process. Prints what is in the tables of docs/sharded.md.
"""

from __future__ import annotations

import argparse
import faulthandler
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PROCESSES, SECONDS, RESULT = 2, 90, "RESULT "
METHODS = ("linearize", "linearize_operators", "forward", "double_backward")


class Block(nn.Module):
    """A block of a transformer, of width 8."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))


def transformer() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), Block(), Block(), nn.Linear(8, 4))


NETS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "mlp": (mlp, (6, 8)),
    "transformer": (transformer, (6, 5, 8)),
}


def made(name: str) -> tuple[nn.Sequential, Tensor]:
    """The same net and whole batch in each process."""
    torch.manual_seed(0)
    make, shape = NETS[name]
    return make().double(), torch.randn(shape, dtype=torch.float64)


def products(
    net: Callable[[Tensor], Tensor], params: Sequence[Tensor], v: Sequence[Tensor], u: Tensor, x: Tensor, method: str
) -> tuple[Tensor, list[Tensor]]:
    """Jv and Jᵀu."""
    from curveball_fused.curvature import METHODS as OURS
    from curveball_fused.replay import Replay

    linear = OURS[method].build(lambda: net(x), params, Replay(params, torch.device("cpu")), "auto")
    _, tangent = linear.jvp(v)
    return tangent, linear.vjp(u)


def directions(net: nn.Module, outputs: torch.Size) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(1)
    return [torch.randn_like(p) for p in net.parameters()], torch.randn(outputs, dtype=torch.float64)


def whole(t: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return t.full_tensor() if isinstance(t, DTensor) else t


def verdict(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> str:
    """How far the products are from those of one process."""

    def error(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        return max(float((whole(x) - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))

    errors = [error([found[0]], [expected[0]]), error(found[1], expected[1])]
    said = "right" if max(errors) < 1e-12 else "WRONG"
    return f"{said}: relative errors of Jv {errors[0]:.0e}, of Jᵀu {errors[1]:.0e}"


def fully_sharded(name: str, reshard: bool) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """The net in one piece, the same one by fully_shard, layer by layer, and the batch.

    Where weights are not to be resharded they stay whole after the forward pass and after the backward pass.
    """
    from torch.distributed.fsdp import fully_shard

    plain, x = made(name)
    net, _ = made(name)
    for layer in net:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, reshard_after_forward=reshard)
    fully_shard(net, reshard_after_forward=reshard).set_reshard_after_backward(reshard)
    return plain, net, x


def unsharded(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that the layers compute with: other objects than those that an optimizer is given."""
    for module in net.modules():
        if hasattr(module, "unshard"):
            module.unshard()
    return list(net.parameters())


def resharded(net: nn.Module) -> None:
    for module in net.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def gathered(name: str, net: nn.Module) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """The net as a function of whole weights, gathered from the shards, and these; none of FSDP's hooks is in it."""
    skeleton = made(name)[0].to("meta")
    weights = {key: p.detach().full_tensor().requires_grad_() for key, p in net.named_parameters()}
    return lambda x: torch.func.functional_call(skeleton, weights, (x,)), list(weights.values())


def by_gathered_parameters(name: str, method: str) -> str:
    plain, net, x = fully_sharded(name, reshard=True)
    v, u = directions(plain, plain(x).shape)
    expected = products(plain, list(plain.parameters()), v, u, x, "linearize")
    function, params = gathered(name, net)
    return verdict(products(function, params, v, u, x, method), expected)


def by_sharded_parameters(name: str, method: str) -> str:
    from torch.distributed.tensor import distribute_tensor

    plain, net, x = fully_sharded(name, reshard=False)
    v, u = directions(plain, plain(x).shape)
    expected = products(plain, list(plain.parameters()), v, u, x, "linearize")
    params = list(net.parameters())
    sharded = [distribute_tensor(t, p.device_mesh, p.placements) for t, p in zip(v, params, strict=True)]
    return verdict(products(net, params, sharded, u, x, method), expected)


def by_unsharded_parameters(name: str, method: str, reshard: bool) -> str:
    plain, net, x = fully_sharded(name, reshard)
    v, u = directions(plain, plain(x).shape)
    expected = products(plain, list(plain.parameters()), v, u, x, "linearize")
    params = unsharded(net)
    if reshard:
        resharded(net)
    return verdict(products(net, params, v, u, x, method), expected)


def by_tensor_parallel_parameters(name: str, method: str) -> str:
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plain, x = made(name)
    net, _ = made(name)
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    v, u = directions(plain, plain(x).shape)
    expected = products(plain, list(plain.parameters()), v, u, x, "linearize")
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if name == "transformer":
        plan = {
            f"{i}.{n}": style for i in "12" for n, style in (("up", ColwiseParallel()), ("down", RowwiseParallel()))
        }
    parallelize_module(net, mesh, plan)
    params = list(net.parameters())
    own = [
        distribute_tensor(t, p.device_mesh, p.placements) if hasattr(p, "placements") else t
        for t, p in zip(v, params, strict=True)
    ]
    return verdict(products(net, params, own, u, x, method), expected)


def gradient_of_sharded_parameters() -> str:
    _, net, x = fully_sharded("mlp", reshard=False)
    params = list(net.parameters())  # before the forward pass, after which the unsharded ones are in their place
    found = torch.autograd.grad(net(x).sum(), params, allow_unused=True)
    return f"{sum(g is None for g in found)} of {len(found)} gradients are None"


def gradient_of_unsharded_parameters() -> str:
    """Each process has its half of the batch."""
    plain, net, x = fully_sharded("mlp", reshard=False)
    part = x.chunk(PROCESSES)[dist.get_rank()]
    alone = torch.autograd.grad(plain(part).square().sum(), list(plain.parameters()))
    params = unsharded(net)
    found = torch.autograd.grad(net(part).square().sum(), params)
    error = max(float((a - b).abs().max()) for a, b in zip(alone, found, strict=True))
    return f"whole, of the own part of the batch, nothing is reduced (error {error:.0e})"


def backward() -> str:
    """Each process has its half of the batch."""
    plain, net, x = fully_sharded("mlp", reshard=True)
    expected = torch.autograd.grad(plain(x).square().sum() / PROCESSES, list(plain.parameters()))
    net(x.chunk(PROCESSES)[dist.get_rank()]).square().sum().backward()
    found = [whole(p.grad) for p in net.parameters() if p.grad is not None]
    error = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    return f"{type(next(net.parameters()).grad).__name__} shards, averaged over the processes (error {error:.0e})"


def dots_of_shards() -> str:
    from curveball_fused import ops

    _, net, _ = fully_sharded("mlp", reshard=False)
    params = [p.detach() for p in net.parameters()]
    expected = sum(float(whole(p.square().sum())) for p in params)
    return f"{float(ops.dots(params, params)[2]):.4f}, where the sum over all is {expected:.4f}"


def forward_mode_of(function: Callable[[Tensor], Tensor]) -> str:
    import torch.autograd.forward_ad as forward_ad

    x, t = torch.arange(4.0) + dist.get_rank(), torch.ones(4) * (1 + dist.get_rank())
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, t))).tangent
    if tangent is None:
        return "WRONG: no tangent, and no error"
    expected = function(t)
    return "right" if torch.equal(whole(tangent), whole(expected)) else f"WRONG: {tangent}"


def functional_gather(x: Tensor) -> Tensor:
    from torch.distributed._functional_collectives import all_gather_tensor_autograd

    gathered: Tensor = all_gather_tensor_autograd(x, 0, dist.group.WORLD)
    return gathered + 0


def gather_of_nn(x: Tensor) -> Tensor:
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))


def gather_of_dtensor(x: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    return DTensor.from_local(x, mesh, [Shard(0)]).full_tensor()


def step_of_optimizer(how: str) -> str:
    """A step as a user would write it, the constructor's refusal left out."""
    from curveball_fused import CurveBall, checks

    refused = checks.parameters
    checks.parameters = lambda _: None  # type: ignore[assignment]
    try:
        _, net, x = fully_sharded("mlp", reshard=True)
        params = list(net.parameters())
        if how == "unsharded":
            params = unsharded(net)
            resharded(net)
        optimizer = CurveBall(params)
    finally:
        checks.parameters = refused
    before = [whole(p.detach()).clone() for p in net.parameters()]
    optimizer.step(lambda: net(x), lambda outputs: outputs.square().mean())
    moved = max(float((whole(p.detach()) - b).abs().max()) for p, b in zip(net.parameters(), before, strict=True))
    return f"no error; the largest change of a weight: {moved:.0e}"


def optimizer_from_before() -> str:
    """One that was made before fully_shard."""
    from torch.distributed.fsdp import fully_shard

    from curveball_fused import CurveBall

    net, x = made("mlp")
    optimizer = CurveBall(net.parameters())
    fully_shard(net)
    optimizer.step(lambda: net(x), lambda outputs: outputs.square().mean())
    return "no error"


def older_fully_sharded(orig: bool) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    from curveball_fused import CurveBall

    net, x = made("mlp")
    net = FullyShardedDataParallel(net, use_orig_params=orig, device_id=torch.device("cpu"))
    optimizer = CurveBall(net.parameters())
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step(lambda: net(x), lambda outputs: outputs.square().mean())
    moved = max(float((p.detach() - b).abs().max()) for p, b in zip(net.parameters(), before, strict=True) if len(b))
    return f"no error; the largest change of a weight: {moved:.0e}"


def prototype(name: str, method: str) -> str:
    """A solve as it would be done: shards of z gathered, products by whole weights, sums over the processes.

    Each process has its half of the batch. Compared are what the solve for β and ρ is made of, and the gradient.
    """
    from torch.distributed.tensor import DTensor, Partial, distribute_tensor

    plain, net, x = fully_sharded(name, reshard=True)
    wholes = list(plain.parameters())
    v, _ = directions(plain, plain(x).shape)
    out = plain(x)
    expected_tangent, expected_r = products(plain, wholes, v, out.detach() / len(x), x, "linearize")
    expected = torch.stack(
        [
            expected_tangent.square().sum() / len(x),  # z·Ĝz of the mean of squares
            sum((a * b).sum() for a, b in zip(v, expected_r, strict=True)),  # z·r
            sum(r.square().sum() for r in expected_r),  # r·r
        ]
    )
    sharded = list(net.parameters())
    z = [distribute_tensor(t, p.device_mesh, p.placements) for t, p in zip(v, sharded, strict=True)]
    part = x.chunk(PROCESSES)[dist.get_rank()]
    function, params = gathered(name, net)
    with torch.no_grad():
        cotangent = function(part) / len(x)
    tangent, r = products(function, params, [t.full_tensor() for t in z], cotangent, part, method)
    r_shards = [
        DTensor.from_local(g, p.device_mesh, [Partial("sum")]).redistribute(placements=p.placements)
        for g, p in zip(r, sharded, strict=True)
    ]
    local = torch.stack(
        [
            tangent.square().sum() / len(x),
            sum((a.to_local() * b.to_local()).sum() for a, b in zip(z, r_shards, strict=True)),
            sum(b.to_local().square().sum() for b in r_shards),
        ]
    )
    dist.all_reduce(local)
    errors = [float((local / expected - 1).abs().max())]
    errors += [float((whole(a) - b).abs().max() / b.abs().max()) for a, b in zip(r_shards, expected_r, strict=True)]
    return f"{'right' if max(errors) < 1e-12 else 'WRONG'}: largest relative error {max(errors):.0e}"


def trials() -> dict[str, Callable[[], str]]:
    found: dict[str, Callable[[], str]] = {
        "torch.autograd.grad with respect to the sharded parameters": gradient_of_sharded_parameters,
        "torch.autograd.grad with respect to the unsharded ones": gradient_of_unsharded_parameters,
        "backward()": backward,
        "a step on the sharded parameters": lambda: step_of_optimizer("sharded"),
        "a step on the unsharded ones": lambda: step_of_optimizer("unsharded"),
        "an optimizer that was made before fully_shard": optimizer_from_before,
        "FullyShardedDataParallel, flat parameters": lambda: older_fully_sharded(False),
        "FullyShardedDataParallel, use_orig_params": lambda: older_fully_sharded(True),
        "ops.dots of shards": dots_of_shards,
        "forward mode of all_gather_tensor_autograd": lambda: forward_mode_of(functional_gather),
        "forward mode of distributed.nn.all_gather": lambda: forward_mode_of(gather_of_nn),
        "forward mode of DTensor.full_tensor": lambda: forward_mode_of(gather_of_dtensor),
    }
    for name in NETS:
        for m in METHODS:
            found |= {
                f"{name}, {m}, sharded parameters": lambda name=name, m=m: by_sharded_parameters(name, m),
                f"{name}, {m}, unsharded parameters, resharded after forward": lambda name=name, m=m: (
                    by_unsharded_parameters(name, m, True)
                ),
                f"{name}, {m}, unsharded parameters, kept": lambda name=name, m=m: by_unsharded_parameters(
                    name, m, False
                ),
                f"{name}, {m}, gathered parameters": lambda name=name, m=m: by_gathered_parameters(name, m),
                f"{name}, {m}, tensor parallel": lambda name=name, m=m: by_tensor_parallel_parameters(name, m),
                f"{name}, {m}, prototype": lambda name=name, m=m: prototype(name, m),
            }
    return found


def run(names: Sequence[str], rank: int, store: str, verbose: bool) -> None:
    """Be one of the two processes: try one piece after the other."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    known = trials()
    for name in names:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        dist.barrier()
        try:
            said = known[name]()
        except Exception as error:
            if verbose:
                traceback.print_exc()
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if rank == 0:
            print(f"{RESULT}{said}", flush=True)
    dist.destroy_process_group()


def tried(names: Sequence[str], verbose: bool) -> Iterator[str]:
    """Yield what happened in each trial, by as few pairs of processes as survive them."""
    names = list(names)
    while names:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, *(["-v"] if verbose else []), "--store", f"{folder}/store"]
            pair = [
                subprocess.Popen(
                    [*command, "--rank", str(rank), *names],
                    stdout=subprocess.PIPE,
                    stderr=None if verbose else subprocess.DEVNULL,
                    text=True,
                )
                for rank in range(PROCESSES)
            ]
            assert pair[0].stdout is not None
            for line in pair[0].stdout:
                if line.startswith(RESULT):
                    del names[0]
                    yield line.removeprefix(RESULT).strip()
            ends = [process.wait() for process in pair]
        if names:
            del names[0]
            yield f"the processes end with {ends}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-v", action="store_true", help="show the errors in full")
    parser.add_argument("-k", default="", help="only trials with this in their names")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.names:
        return run(given.names, given.rank, given.store, given.v)
    names = [name for name in trials() if given.k in name]
    print("| what | what happens |\n|---|---|")
    for name, said in zip(names, tried(names, given.v), strict=True):
        print(f"| {name} | {said} |", flush=True)
    return None


if __name__ == "__main__":
    main()
