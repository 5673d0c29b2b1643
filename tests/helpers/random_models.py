"""Small models composed at random of what models are made of, as programs that Hypothesis shrinks and prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

ROWS, WIDTH = 4, 6
X = torch.linspace(-1, 1, ROWS * WIDTH, dtype=torch.float64).mul(3).sin().view(ROWS, WIDTH)
IDS = torch.tensor([0, 3, 3, 1])


class Block(NamedTuple):
    """A function of a module of its own and of the hidden units, which keeps their shape."""

    make: Callable[[], nn.Module]
    run: Callable[[Any, Tensor], Tensor]


class Weight(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape) / 2)


class Cube(torch.autograd.Function):
    """A backward pass that autograd can differentiate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad * ctx.saved_tensors[0] ** 2


class WithoutGraph(Cube):
    """A backward pass without a graph, as that of a fused kernel or of an adjoint solver."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad * ctx.saved_tensors[0] ** 2


class Detached(Cube):
    """Likewise, and autograd takes what it returns for a constant."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad.detach() * ctx.saved_tensors[0] ** 2


@torch.library.custom_op("test_random_models::gated", mutates_args=())
def gated(x: Tensor, w: Tensor) -> Tensor:
    return x * w.sigmoid()


gated.register_autograd(
    lambda ctx, g: (
        g * ctx.saved_tensors[1].sigmoid(),
        (g * ctx.saved_tensors[0]).sum(0) * ctx.saved_tensors[1].sigmoid() * (-ctx.saved_tensors[1]).sigmoid(),
    ),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def linear(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(WIDTH, WIDTH, **options)


def call(net: Any, h: Tensor) -> Tensor:
    return net(h)


def nothing() -> nn.Module:
    return nn.Identity()


def in_place(net: Any, h: Tensor) -> Tensor:
    y = net(h)
    y += 1
    y[:, 0] = h[:, 1] * h[:, 2]
    y[1].mul_(0.5)
    return y.clamp_(-2, 2)


def buffer_filled(net: Any, h: Tensor) -> Tensor:
    slots = h.new_zeros(ROWS, WIDTH)
    for i in range(ROWS):
        slots[ROWS - 1 - i] = net(h[i])
    return slots.index_add(0, torch.tensor([2, 0]), h[:2])


def cut_and_joined(_: Any, h: Tensor) -> Tensor:
    a, b, c = h.chunk(3, 1)
    rows = torch.stack((torch.cat((c, a), 1), torch.cat((a, b * c), 1))).permute(1, 2, 0)
    return rows.reshape(ROWS, 8)[:, 1:7].flip(0).roll(1, 1) + h.T[[4, 0, 2, 2, 1, 3]].T


def with_constants(_: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = h.square().mean().sqrt()
    return h / (1 + scale) + 0.5 * h.detach()


def branch(net: Any, h: Tensor) -> Tensor:
    return net(h) if h.sum() > 0 else h.tanh()


def forces(net: Any, h: Tensor) -> Tensor:
    return h + torch.autograd.grad(net(h).tanh().sum(), h, create_graph=True)[0]


def directional(net: Any, h: Tensor) -> Tensor:
    return torch.func.jvp(lambda x: net(x).sin(), (h,), (torch.ones_like(h),))[1] + h


def attention(net: Any, h: Tensor) -> Tensor:
    return net(h[:, None], h[:, None], h[:, None], need_weights=False)[0][:, 0]


def frozen() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH).requires_grad_(False)


def pooled(_: Any, h: Tensor) -> Tensor:
    return F.interpolate(F.max_pool1d(h[None], 2), WIDTH)[0] + F.avg_pool1d(h[None], 3, 1, 1)[0]


BLOCKS: dict[str, Block] = {
    "linear": Block(linear(), call),
    "conv": Block(lambda: nn.Conv1d(ROWS, ROWS, 3, padding=1), call),
    "layer norm": Block(lambda: nn.LayerNorm(WIDTH), call),
    "batch norm": Block(lambda: nn.BatchNorm1d(WIDTH), call),
    "group norm": Block(lambda: nn.GroupNorm(2, WIDTH), call),
    "rms norm": Block(lambda: nn.RMSNorm(WIDTH), call),
    "attention": Block(lambda: nn.MultiheadAttention(WIDTH, 2), attention),
    "gru": Block(lambda: nn.GRU(WIDTH, WIDTH), lambda net, h: net(h)[0]),
    "embedding": Block(lambda: nn.Embedding(5, WIDTH, padding_idx=1), lambda net, h: h + net(IDS)),
    "bag": Block(lambda: nn.EmbeddingBag(5, WIDTH), lambda net, h: h * net(IDS.view(1, 4))),
    "dropout": Block(lambda: nn.Dropout(0.3), call),
    "frozen": Block(frozen, call),
    "tied": Block(linear(bias=False), lambda net, h: F.linear(net(h).tanh(), net.weight.T)),
    "weight norm": Block(lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), call),
    "spectral norm": Block(lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), call),
    "orthogonal": Block(lambda: parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH, bias=False)), call),
    "in place": Block(linear(), in_place),
    "buffer": Block(linear(), buffer_filled),
    "cut and joined": Block(nothing, cut_and_joined),
    "constants": Block(nothing, with_constants),
    "pooled": Block(nothing, pooled),
    "branch": Block(linear(), branch),
    "forces": Block(linear(), forces),
    "jvp": Block(linear(), directional),
    "vmap": Block(linear(), lambda net, h: torch.func.vmap(lambda row: net(row).exp() / (1 + row.square().sum()))(h)),
    "functional call": Block(
        linear(), lambda net, h: torch.func.functional_call(net, {"weight": net.weight * 0.5, "bias": h[0]}, (h,))
    ),
    "function": Block(nothing, lambda _, h: Cube.apply(h / 2)),
    "function without graph": Block(nothing, lambda _, h: WithoutGraph.apply(h / 2)),
    "function with a detached backward": Block(nothing, lambda _, h: h + Detached.apply(h / 2)),
    "custom operator": Block(lambda: Weight(WIDTH), lambda net, h: gated(h, net.weight)),
    "distances": Block(lambda: Weight(WIDTH, WIDTH), lambda net, h: torch.cdist(h, net.weight)),
    "einsum": Block(lambda: Weight(WIDTH, WIDTH), lambda net, h: torch.einsum("bi,ij,bj->bj", h, net.weight, h.sin())),
    "softmax": Block(nothing, lambda _, h: 3 * h.softmax(-1) + h.log_softmax(0)),
    "sort": Block(nothing, lambda _, h: h.sort(1).values.cumsum(0) + h.max(1, keepdim=True).values),
    "where": Block(nothing, lambda _, h: torch.where(h > 0, h.exp().clamp(max=3), h.sin())),
    "fourier": Block(nothing, lambda _, h: torch.fft.irfft(torch.fft.rfft(h) * torch.fft.rfft(h.roll(1)), WIDTH)),
    "product": Block(nothing, lambda _, h: torch.scatter_reduce(h, 0, IDS[:1, None].expand(1, WIDTH), h[1:2], "prod")),
    **{
        name: Block(nothing, lambda _, h, name=name: getattr(F, name)(h))
        for name in ("relu", "gelu", "silu", "tanh", "softplus", "hardswish", "elu", "mish", "hardsigmoid", "relu6")
    },
}  # fmt: skip
NESTED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "residual": lambda f, h: h + f(h),
    "checkpoint": lambda f, h: checkpoint(f, h, use_reentrant=False) if f.checkpointed else f(h),
    "rows one by one": lambda f, h: torch.cat([f(h), f(h.flip(0))]).view(2, ROWS, WIDTH).mean(0),
}

# A program: names of blocks, and pairs of the name of a nesting and a program.
programs: st.SearchStrategy[Any] = st.recursive(
    st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3),
    lambda inner: st.lists(
        st.one_of(st.sampled_from(sorted(BLOCKS)), st.tuples(st.sampled_from(sorted(NESTED)), inner)),
        min_size=1,
        max_size=4,
    ),
    max_leaves=4,
)


class Program(nn.Module):
    """A program with its modules, on the hidden units.

    Attributes:
        checkpointed: whether this program is run again in each backward pass, where it is nested in a checkpoint.
    """

    checkpointed = True

    def __init__(self, program: list[Any]) -> None:
        super().__init__()
        self.program = program
        self.parts = nn.ModuleList(
            BLOCKS[part].make() if isinstance(part, str) else Program(part[1]) for part in program
        )

    def forward(self, h: Tensor) -> Tensor:
        for part, net in zip(self.program, self.parts):
            h = BLOCKS[part].run(net, h) if isinstance(part, str) else NESTED[part[0]](net, h)
        return h


def model_of(program: list[Any], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Program(program), nn.Tanh(), nn.Linear(WIDTH, 3)).double()
