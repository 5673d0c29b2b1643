"""torch.nn.utils.parametrize: what is trained is what a weight is made of, and the weight keeps its constraint."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from curveball_fused import CurveBall
from tests.helpers.against_oracle import METHODS, assert_like_oracle, targets
from tests.helpers.tiers import slow

X = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.triu()


class Positive(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.exp()

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.abs().log()


class OfLowRank(nn.Module):
    """One weight of two parameters."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        u, s, v = torch.linalg.svd(w)
        return u[:, :2] * s[:2], v[:2]


def layer() -> nn.Module:
    return nn.Linear(5, 5, dtype=torch.float64)


def of_own(*maps: nn.Module) -> nn.Module:
    made = layer()
    for one in maps:
        parametrize.register_parametrization(made, "weight", one)
    return made


def is_orthogonal(w: Tensor) -> bool:
    return torch.allclose(w @ w.mT, torch.eye(5, dtype=w.dtype), rtol=0, atol=1e-12)


def is_symmetric(w: Tensor) -> bool:
    return torch.equal(w, w.mT)


def orthogonal(how: str, **options: bool) -> nn.Module:
    return parametrizations.orthogonal(layer(), orthogonal_map=how, **options)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], object]]] = {
    "weight norm": (lambda: parametrizations.weight_norm(layer()), lambda _: True),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(layer(), n_power_iterations=20),
        lambda w: abs(torch.linalg.matrix_norm(w, 2) - 1) < 0.1,
    ),
    "matrix_exp": (lambda: orthogonal("matrix_exp"), is_orthogonal),
    "cayley": (lambda: orthogonal("cayley"), is_orthogonal),
    # Signs are on the diagonal of its parameter, and truncated to integers: weight decay, by whatever optimizer, makes
    # them zeros, as it does here.
    "householder": (lambda: orthogonal("householder"), lambda w: not w.any()),
    "without trivialization": (lambda: orthogonal("matrix_exp", use_trivialization=False), is_orthogonal),
    "symmetric": (lambda: of_own(Symmetric()), is_symmetric),
    "positive and symmetric": (lambda: of_own(Symmetric(), Positive()), lambda w: is_symmetric(w) and w.min() > 0),
    "of low rank": (lambda: of_own(OfLowRank()), lambda w: torch.linalg.matrix_rank(w) == 2),
}


@pytest.mark.filterwarnings("ignore:curveball_fused")
@pytest.mark.parametrize("method", [METHODS[0], *map(slow, METHODS[2:])])
@pytest.mark.parametrize("name", LAYERS)
def test_steps_are_those_of_the_oracle_and_keep_the_constraint(name: str, method: str) -> None:
    make, holds = LAYERS[name]
    net = assert_like_oracle(
        lambda: nn.Sequential(make(), nn.Tanh(), nn.Linear(5, 3)), lambda net: net(X), targets(6, 3), method
    )
    assert holds(net[0].weight.detach())


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_left_when_the_parametrization_is_removed(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(LAYERS[name][0](), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = CurveBall(net.parameters(), curvature="double_backward")
    for _ in range(3):
        optimizer.step(lambda: net(X), targets(6, 3))
    outputs = net.eval()(X)
    parametrize.remove_parametrizations(net[0], "weight")
    torch.testing.assert_close(net(X), outputs)
    assert type(net[0]) is nn.Linear and all(p.grad is None for p in net.parameters())


def test_one_of_the_own_kind_may_be_registered_when_the_optimizer_is_made() -> None:
    """It keeps the parameter's object; weight norm, which makes two new ones of it, does not."""
    torch.manual_seed(0)
    net = nn.Sequential(layer(), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = CurveBall(net.parameters())
    optimizer.step(lambda: net(X), targets(6, 3))
    parametrize.register_parametrization(net[0], "weight", Symmetric())
    before = net[0].weight.detach().clone()
    optimizer.step(lambda: net(X), targets(6, 3))
    assert is_symmetric(net[0].weight) and not torch.equal(net[0].weight, before)


def test_weight_norm_in_a_gradient_checkpoint_goes_by_dual_numbers() -> None:
    torch.manual_seed(0)
    first, last = parametrizations.weight_norm(layer()), nn.Linear(5, 3).double()
    optimizer = CurveBall([*first.parameters(), *last.parameters()])
    with pytest.warns(UserWarning, match="dual numbers are used instead") as caught:
        optimizer.step(lambda: last(checkpoint(first, X, use_reentrant=False).tanh()), targets(6, 3))
    assert not any("double backward" in str(w.message) for w in caught)
