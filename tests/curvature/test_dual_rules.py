"""Our own forward-mode rules against finite differences and against double backward."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused.curvature import dual_rules
from curveball_fused.curvature.dual_numbers import DualNumbers
from tests.helpers import nets
from tests.helpers.jacobians import MODES, dot, finite_difference, linearized, products

RULED = {
    "linear without bias": lambda: (nn.Linear(4, 3, bias=False), torch.randn(2, 4)),
    "linear of a vector": lambda: (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(4)),
    "linear of a transposed input": lambda: (
        nn.Sequential(nn.Linear(4, 3), nn.Flatten(0, 1), nn.Linear(3, 2)),
        torch.randn(4, 3, 2).permute(2, 1, 0),
    ),
    "batch norm": lambda: (nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), torch.randn(4, 2, 3, 3)),
    "batch norm, channels last": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)),
        torch.randn(4, 2, 3, 3).to(memory_format=torch.channels_last),
    ),
    "batch norm without statistics": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)),
        torch.randn(5, 3),
    ),
    "batch norm without affine": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)),
        torch.randn(5, 3),
    ),
    "batch norm in eval mode": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(),
        torch.randn(5, 3),
    ),
    "layer norm": lambda: (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), torch.randn(5, 3)),
    "layer norm without bias": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, bias=False)),
        torch.randn(5, 3),
    ),
    "layer norm over two dimensions": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.LayerNorm((5, 4))),
        torch.randn(2, 5, 3),
    ),
    "softmax": lambda: (nn.Sequential(nn.Linear(3, 4), nn.Softmax(1)), torch.randn(5, 3)),
    "max pooling": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 1), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(2)),
        torch.randn(2, 2, 9, 8),
    ),
    "max pooling, channels last, dilated": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 1), nn.MaxPool2d(2, 1, dilation=2)),
        torch.randn(2, 2, 7, 6).to(memory_format=torch.channels_last),
    ),
    "max pooling of one image": lambda: (nn.Sequential(nn.Conv2d(2, 3, 1), nn.MaxPool2d(2)), torch.randn(2, 4, 4)),
    "RMS norm": lambda: (nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4)), torch.randn(5, 3)),
    "RMS norm without weight": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.RMSNorm((5, 4), eps=0.1, elementwise_affine=False)),
        torch.randn(2, 5, 3),
    ),
    "batch norm of the input": lambda: (nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4)), torch.randn(5, 3)),
    "convolutions": lambda: (
        nn.Sequential(
            nn.Conv3d(2, 3, 2, bias=False),
            nn.Flatten(2),
            nn.Conv1d(3, 4, 3, 2, 1, groups=1),
            nn.Unflatten(2, (-1, 2)),
            nn.Conv2d(4, 4, 2, padding="same", groups=2),
        ),
        torch.randn(2, 2, 3, 3, 3),
    ),
    "activations": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.SiLU(), nn.GELU(approximate="tanh"), nn.Linear(4, 3), nn.ReLU()),
        torch.randn(5, 3),
    ),
    "group norm": lambda: (nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4)), torch.randn(2, 2, 3, 3)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(RULED))
def test_rules_against_finite_differences(name: str, mode: Any) -> None:
    model, x = RULED[name]()
    model, x = model.double(), x.double()
    for p in model.parameters():
        nn.init.normal_(p)
    outputs, jz, r, jr, z, u = products(mode, model, x)
    params = list(model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(outputs, model(x))
        torch.testing.assert_close(jz, finite_difference(lambda: model(x), params, z), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(jr, finite_difference(lambda: model(x), params, r), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dot(r, r), (jr * u).sum(), rtol=1e-12, atol=1e-12)


def test_every_rule_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions that torch's own modules call are those that the rules are kept under."""
    called = set()
    for function, rule in list(dual_rules.RULES.items()):

        def call(*args: Any, _function: Any = function, _rule: Any = rule, **kwargs: Any) -> Any:
            result = _rule(*args, **kwargs)
            if result is not NotImplemented:
                called.add(_function)
            return result

        monkeypatch.setitem(dual_rules.RULES, function, call)
    for name in ("convolution + batch norm", "attention"):
        model, x = nets.make(name)
        products(DualNumbers, model, x)
    for name in ("softmax", "layer norm", "group norm", "RMS norm", "convolutions", "activations"):
        products(DualNumbers, *RULED[name]())
    products(DualNumbers, TiedWithPadding(), torch.tensor([0, 3]))
    products(DualNumbers, nn.EmbeddingBag(5, 3), torch.tensor([[0, 3]]))
    products(DualNumbers, Distances(), torch.randn(4, 3))
    assert called == set(dual_rules.RULES)


class Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.layer(x)
        return torch.cat((torch.cdist(rows, x).flatten(), torch.pdist(rows)))


class TiedWithPadding(nn.Module):
    """The padding row gets no gradient as input, and one as output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3, padding_idx=-1)
        nn.init.normal_(self.embedding.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.embedding(tokens)) @ self.embedding.weight.T


def test_padding_index_gets_no_tangent_as_it_gets_no_gradient() -> None:
    tokens = torch.tensor([[0, 4, 3], [4, 4, 1]])
    torch.manual_seed(0)
    model = TiedWithPadding().double()
    expected, *others = (products(mode, model, tokens) for mode in MODES)
    for ours in others:
        for i in (0, 1, 3):
            torch.testing.assert_close(ours[i], expected[i], rtol=1e-12, atol=1e-12)


def causal(q: Tensor) -> dict[str, Any]:
    return dict(is_causal=True)


def boolean(q: Tensor) -> dict[str, Any]:
    mask = torch.rand(q.shape[-2], q.shape[-2]) > 0.4
    mask[1] = False  # a row that sees nothing
    return dict(attn_mask=mask)


def additive(q: Tensor) -> dict[str, Any]:
    return dict(attn_mask=torch.randn(q.shape[-2], q.shape[-2], dtype=q.dtype), scale=0.3)


@pytest.mark.parametrize("options", [causal, boolean, additive])
def test_attention_rule(options: Any) -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    layer = nn.Linear(6, 18, dtype=torch.float64)
    keywords = options(x)

    def model() -> Tensor:
        q, k, v = layer(x).unflatten(2, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, **keywords)

    params = list(layer.parameters())
    z = [torch.randn_like(p) for p in params]
    outputs, jz = linearized(DualNumbers, model, params).jvp(z)
    with torch.no_grad():
        torch.testing.assert_close(outputs, model())
        torch.testing.assert_close(jz, finite_difference(model, params, z), rtol=1e-6, atol=1e-8)


FIRST_STEP = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from torch import nn
from curveball_fused import CurveBall
net = nn.Sequential(nn.Linear(3, 4), nn.Mish(), nn.Linear(4, 2))
CurveBall(net.parameters(), curvature=sys.argv[2]).step(lambda: net(torch.ones(5, 3)), lambda out: out.square().mean())
"""


@pytest.mark.parametrize("curvature", ["forward", pytest.param("linearize", marks=pytest.mark.slow)])
def test_the_first_dual_numbers_of_a_process_raise_no_warnings(curvature: str) -> None:
    """Then torch compiles decompositions, of whose way it warns that it is deprecated."""
    command = [sys.executable, "-W", "error", "-c", FIRST_STEP, str(Path(__file__).parents[2]), curvature]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
