"""Models that the linearized run follows, and what a few steps make of one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall

X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
IMAGES = torch.linspace(-1, 1, 4 * 2 * 36, dtype=torch.float64).sin().view(4, 2, 6, 6)
Model = Callable[[nn.Module], Tensor]


def several(net: Any) -> Tensor:
    """Many results, lists, indices, broadcasting, a constant part, one tensor used twice."""
    a, b, c = net(X).chunk(3, dim=1)
    rows = torch.stack([torch.cat((a, b.exp()), 1)[:, 1:], (a * b + c).repeat(1, 2)[..., :3]])
    with torch.no_grad():
        shift = net(X).mean()
    return rows.unbind(0)[1] * 0.5 + rows[0].T.softmax(0).T + shift + 2 * a[:, :1] - c.detach()[:, :1]


def in_place(net: Any) -> Tensor:
    x = net[0](X)
    x += 1
    x *= 0.5
    x = x.sub_(X[:, :5], alpha=2)
    x[:, 1] = x[:, 0] * 2
    x[0] = 3.0
    slots = torch.zeros(4, 5, dtype=torch.float64)
    slots[:, 2:] = x[:, 2:]
    slots += x
    return net[1](slots).relu_() + F.relu(net[1](x.exp()), inplace=True)


def written(net: Any) -> Tensor:
    x = net(X)
    F.silu(x, inplace=True)
    x = F.leaky_relu(F.hardswish(x.clone(), inplace=True), 0.1, True)
    x = F.dropout(x + 1, 0.2, inplace=True)
    rows = torch.zeros(3, 6, dtype=torch.float64).index_add_(0, torch.tensor([0, 2, 0, 1]), x)
    rows.scatter_add_(1, torch.tensor([[1, 0], [3, 3]]), x[:2, :2])
    return rows.scatter_(0, torch.tensor([[0, 2]]), X[:1]).index_copy_(1, torch.tensor([4]), x[1:, :1])


def complex_numbers(net: Any) -> Tensor:
    return torch.fft.rfft(net(X)).abs() * torch.view_as_real(torch.fft.fft(net(X)).exp().tanh()).sum(-1)[:, :4]


def grouped_queries(net: Any) -> Tensor:
    q = net(X).view(1, 2, 2, 6).transpose(0, 1).reshape(1, 4, 2, 3)
    k, v = net(X + 1).view(1, 2, 4, 3), net(X - 1).view(1, 2, 4, 3)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.7)


def activations(net: Any) -> Tensor:
    x = net(X)
    total = x.sigmoid() * 2 + torch.tanh(x) / 3 + F.silu(x) - F.mish(x) + F.elu(x, 0.7) - F.softplus(x, beta=2)
    total = total + F.leaky_relu(x, 0.1) + x.exp() * x.square() + x.abs().sqrt() - (1 - x) ** 3 + F.hardswish(x)
    total = total + F.gelu(x) + F.gelu(x, approximate="tanh") + x.clamp(-0.3, 0.4) + (x**2 + 1).log() + x.cos()
    return total.masked_fill(X > 0.5, 7) / (x.detach() + 3) + 1 / (2 + x.sigmoid())


def arrangements(net: Any) -> Tensor:
    x = net(X)
    y = torch.cat((x.T.flip(0), X.T, x.mT), 1).unfold(1, 4, 4).contiguous().permute(1, 0, 2).flatten(0, 1)
    y = y.index_select(0, torch.tensor([0, 3, 4, 7])).repeat(1, 3)[:, ::2] - F.pad(x, (1, 1), value=2.0)[:, :6]
    a, b = y.view(4, 2, 3).unbind(1)
    y = torch.stack((a.cumsum(0), b.roll(1, 1), a.expand(4, 3)), 1).flatten(1).unflatten(1, (3, 3)).triu()
    z = (
        F.interpolate(x.view(1, 1, 4, 6), scale_factor=2, mode="bilinear")
        - F.avg_pool2d(x[None, None].float().double(), 2).mean()
    )
    return (
        y.gather(2, torch.zeros(4, 3, 1, dtype=torch.int64)).squeeze(2)
        + z.narrow(3, 2, 3)[0, 0, ::2]
        + x.sum((0, 1), keepdim=True)
    )


def changing_arguments(net: Any) -> Tensor:
    """Lists and slices that the model goes on to change."""
    h, order, begin, pad = net(X), [2, 0, 3, 1], torch.tensor(1), [1, 1]
    y = h[order] + F.pad(h, pad)[:, :6] + torch.softmax(h, -1, torch.float64)
    order.reverse()
    pad[0] = 0
    y = y[:, begin : begin + 3]
    begin += 2
    return y


def frozen() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.ConvTranspose2d(3, 3, 2, bias=False), nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2),
        nn.Flatten(), nn.Linear(50, 4), nn.LayerNorm(4), nn.Linear(4, 3),
    )  # fmt: skip
    for p in (net[0].weight, net[1].weight, net[2].bias, net[3].weight, net[5].weight, net[6].bias, net[7].bias):
        p.requires_grad_(False)
    return net


FOLLOWED: dict[str, tuple[Callable[[], nn.Module], Model]] = {
    "several results": (lambda: nn.Linear(6, 6), several),
    "in place": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)), in_place),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, groups=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 2, bias=False), nn.InstanceNorm2d(4), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ),
        lambda net: net(IMAGES),
    ),
    "batch norm in eval mode": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.GELU(approximate="tanh")).eval(),
        lambda net: net(X),
    ),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 3)), lambda net: net(X)),
    "dropout of everything": (lambda: nn.Linear(6, 3), lambda net: F.dropout(net(X), 1.0) + net.bias),
    "recurrent layer": (lambda: nn.LSTM(6, 3, 2), lambda net: net(X[:, None])[0]),
    "other functions": (
        lambda: nn.Linear(6, 6),
        lambda net: torch.einsum("bi,ij->bj", net(X).sort(1).values, net.weight.inverse()).max(1)[0].relu().pow(2),
    ),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, activation="gelu"),
        lambda net: net(X[:, None] + X[None]),
    ),
    "padded embedding": (
        lambda: nn.Embedding(5, 4, padding_idx=1),
        lambda net: torch.tanh(net(torch.tensor([0, 1, 4, 1, 2]))),
    ),
    "attention with dropout": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3, batch_first=True, norm_first=True),
        lambda net: net(X[:, None] + X[None]),
    ),
    "attention over a memory": (
        lambda: nn.MultiheadAttention(6, 2, bias=False, kdim=4, vdim=3),
        lambda net: net(X[:, None], X[:, None, :4], X[:, None, 1:4], attn_mask=torch.ones(4, 4).tril() == 0)[0],
    ),
    "grouped queries": (lambda: nn.Linear(6, 6), grouped_queries),
    "other normalizations": (
        lambda: nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.RMSNorm(8)),
        lambda net: net(X),
    ),
    "batch norm first": (
        lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4, affine=False), nn.Flatten()),
        lambda net: net(IMAGES),
    ),
    "channels dropped": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.Dropout2d(0.4), nn.Flatten()), lambda net: net(IMAGES)
    ),
    "activations": (lambda: nn.Linear(6, 6), activations),
    "arrangements": (lambda: nn.Linear(6, 6), arrangements),
    "activations in place": (lambda: nn.Linear(6, 6), written),
    "complex numbers": (lambda: nn.Linear(6, 6), complex_numbers),
    "arguments that change": (lambda: nn.Linear(6, 6), changing_arguments),
    "a result that is not used": (
        lambda: nn.Linear(6, 6), lambda net: (net(X).cumprod(1), net(X).sin(), net(X).tanh())[2]
    ),
    "parts that are frozen": (frozen, lambda net: net(IMAGES)),
    "only a bias": (lambda: nn.Linear(6, 2).requires_grad_(False), lambda net: net(X) * net.bias),
}  # fmt: skip


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def steps(make: Callable[[], nn.Module], run: Model, curvature: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    net = make().double()
    if not any(p.requires_grad for p in net.parameters()):
        net.bias.requires_grad_()
    optimizer = CurveBall(net.parameters(), curvature=curvature, lambda_interval=1)
    log = []
    for step in range(3):
        torch.manual_seed(step)
        loss, outputs = optimizer.step(lambda: run(net), lambda out: (out - 0.3).square().mean())
        log += [loss, outputs, torch.rand(()), *optimizer.stats().values()]
    return log, copy.deepcopy(net.state_dict())
