"""Losses that people train with, three steps each against dense matrices; or refused, with what to do instead."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from tests.helpers.oracle import DenseCurveBall

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 6, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(0, 3, (12,), generator=GENERATOR)
TARGET = torch.randn(12, 3, generator=GENERATOR, dtype=torch.float64)
RATES = torch.rand(12, 3, generator=GENERATOR, dtype=torch.float64)
ONE_HOT = F.one_hot(Y, 3).double()
SIGNS = 2 * ONE_HOT - 1
ALTERNATING = torch.tensor([1.0, -1.0] * 3, dtype=torch.float64)
PAIRS = torch.triu_indices(12, 12, 1)
LENGTHS = torch.tensor([6, 4]), torch.tensor([2, 1])
LABELS = torch.tensor([[1, 1], [2, 0]])

Loss = Callable[[Tensor], Tensor]


def focal(o: Tensor) -> Tensor:
    log_p = o.log_softmax(1).gather(1, Y[:, None])
    return -((1 - log_p.exp()).square() * log_p).mean()


def dice(o: Tensor) -> Tensor:
    p = o.sigmoid()
    return 1 - (2 * (p * ONE_HOT).sum() + 1) / (p.sum() + ONE_HOT.sum() + 1)


def info_nce(o: Tensor) -> Tensor:
    a, b = F.normalize(o[:6], dim=1), F.normalize(o[6:], dim=1)
    return F.cross_entropy(a @ b.T / 0.5, torch.arange(6))


def smoothed(o: Tensor) -> Tensor:
    log_p = o.log_softmax(1)
    return -(0.9 * log_p.gather(1, Y[:, None]).mean() + 0.1 * log_p.mean())


def distances(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None] - b).norm(dim=2)


def documented(name: str) -> Callable[..., Tensor]:
    """Return a function that the documentation shows."""
    text = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f"def {name}(" in b)
    names: dict[str, Any] = {}
    exec(block, names)
    function: Callable[..., Tensor] = names[name]
    return function


CONVEX: dict[str, Loss] = {
    "cross_entropy": lambda o: F.cross_entropy(o, Y, label_smoothing=0.1),
    "nll_loss of log_softmax": lambda o: F.nll_loss(o.log_softmax(1), Y),
    "nll_loss of the log of a softmax": lambda o: F.nll_loss(o.softmax(1).log(), Y),
    "mse_loss": lambda o: F.mse_loss(o, TARGET),
    "mse_loss, weight": lambda o: F.mse_loss(o, TARGET, weight=RATES),
    "huber_loss": lambda o: F.huber_loss(o, TARGET, delta=0.8),
    "smooth_l1_loss": lambda o: F.smooth_l1_loss(o, TARGET, beta=0.7),
    "gaussian_nll_loss, var constant": lambda o: F.gaussian_nll_loss(o, TARGET, RATES + 0.1),
    "poisson_nll_loss": lambda o: F.poisson_nll_loss(o, RATES),
    "poisson_nll_loss, full": lambda o: F.poisson_nll_loss(o, 3 * RATES, full=True),
    "kl_div": lambda o: F.kl_div(o.log_softmax(1), RATES.softmax(1), reduction="batchmean"),
    "kl_div, log_target": lambda o: F.kl_div(o.log_softmax(1), RATES.log_softmax(1), log_target=True, reduction="sum"),
    "multilabel_soft_margin_loss": lambda o: F.multilabel_soft_margin_loss(o, ONE_HOT),
    "binary_cross_entropy": lambda o: F.binary_cross_entropy(o.sigmoid(), ONE_HOT, weight=RATES),
    "binary_cross_entropy_with_logits": lambda o: F.binary_cross_entropy_with_logits(o, RATES, pos_weight=RATES[0] + 1),
    "logsigmoid": lambda o: -F.logsigmoid(SIGNS * o).mean(),
    "soft_margin_loss": lambda o: F.soft_margin_loss(o, SIGNS),
    "squared hinge": lambda o: F.relu(1 - SIGNS * o).square().mean(),
    "smoothing by hand": smoothed,
    "log cosh": lambda o: (o - TARGET).cosh().log().mean(),
    "norm": lambda o: (o - TARGET).norm(dim=1).mean(),
    "root": lambda o: F.mse_loss(o, TARGET).sqrt(),
}
# Their Hessian is indefinite somewhere. Where it is along a step, that is a safe one.
NOT_CONVEX: dict[str, Loss] = {
    "gaussian_nll_loss, var predicted": lambda o: F.gaussian_nll_loss(o[:, 0], TARGET[:, 0], F.softplus(o[:, 1]) + 0.1),
    "poisson_nll_loss of rates": lambda o: F.poisson_nll_loss(F.softplus(o), RATES, log_input=False),
    "kl_div the other way": lambda o: F.kl_div(RATES.log_softmax(1), o.softmax(1), reduction="batchmean"),
    "cosine_embedding_loss": lambda o: F.cosine_embedding_loss(o[:6], o[6:], ALTERNATING, margin=-0.9),
    "triplet_margin_loss": lambda o: F.triplet_margin_loss(o[:4], o[4:8], o[8:], margin=5.0),
    "focal loss": focal,
    "dice loss": dice,
    "InfoNCE": info_nce,
    "policy gradient": lambda o: -(o.log_softmax(1).gather(1, Y[:, None]) * TARGET[:, :1]).mean(),
    "distances by hand": lambda o: (distances(o[:6], o[6:]) - 1).square().mean(),
    "hinge_embedding_loss": lambda o: F.hinge_embedding_loss(distances(o[:6], o[6:]).diagonal(), ALTERNATING),
}
# What cannot be differentiated twice, a word of its error, and what that says to do instead.
REPLACED: dict[str, tuple[Loss, str, Loss]] = {
    "cdist": (
        lambda o: torch.cdist(o[:6], o[6:]).square().mean(),
        r"\(a\[:, None\] - b\)\.norm\(dim=2\)",
        lambda o: (o[:6][:, None] - o[6:]).norm(dim=2).square().mean(),
    ),
    "pdist": (
        lambda o: F.pdist(o).square().mean(),
        r"triu_indices",
        lambda o: (o[PAIRS[0]] - o[PAIRS[1]]).norm(dim=1).square().mean(),
    ),
    "multi_margin_loss": (
        lambda o: F.multi_margin_loss(o, Y, p=2),
        r"F\.multi_margin_loss: .*relu",
        lambda o: ((1 + o - o.gather(1, Y[:, None])).relu() * (1 - F.one_hot(Y, o.shape[1]))).square().mean(),
    ),
    "multilabel_margin_loss": (
        lambda o: F.multilabel_margin_loss(o, torch.tensor([[2, -1, 0]] * 12)),
        r"F\.multilabel_soft_margin_loss",
        lambda o: F.multilabel_soft_margin_loss(o, torch.tensor([[0.0, 0.0, 1.0]] * 12)),
    ),
    "ctc_loss": (
        lambda o: F.ctc_loss(o.view(6, 2, 3).log_softmax(2), LABELS, *LENGTHS),
        r"F\.ctc_loss: .*docs/losses\.md",
        lambda o: documented("ctc")(o.view(6, 2, 3).log_softmax(2), LABELS, *LENGTHS),
    ),
}
IN_THE_MODEL: dict[str, tuple[nn.Module, Loss]] = {
    "sigmoid": (nn.Sigmoid(), lambda o: F.binary_cross_entropy(o, ONE_HOT)),
    "softmax": (nn.Softmax(1), lambda o: F.nll_loss(o.log(), Y)),
    "softmax, gathered": (nn.Softmax(1), lambda o: -o.gather(1, Y[:, None]).log().mean()),
    "log_softmax, exponentiated": (nn.LogSoftmax(1), lambda o: (o.exp() - ONE_HOT).square().sum(1).mean()),
}


def net_of(last: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), last or nn.Identity()).double()


def check(net: nn.Module, loss_fn: Loss, curvature: str) -> None:
    """Three steps, or as many as are not safe ones."""
    reference = copy.deepcopy(net)
    options: dict[str, Any] = dict(lambd=0.7, lambda_low=0.9, lambda_high=1.1, lambda_factor=0.97, lambda_interval=2)
    optimizer = CurveBall(net.parameters(), 0.8, weight_decay=0.03, curvature=curvature, **options)
    names = [name for name, _ in reference.named_parameters()]
    oracle = DenseCurveBall(reference, [names], [0.8], [0.03], 0.7, 0.9, 1.1, 0.97, 2)
    for _ in range(3):
        loss, _ = optimizer.step(lambda: net(X), loss_fn)
        stats = optimizer.stats()
        torch.testing.assert_close(loss, loss_fn(reference(X)).detach(), rtol=1e-9, atol=1e-9)
        if stats["safe_steps"] > 0:
            assert stats["rho"] == 0 and stats["beta"] > 0 and stats["predicted_change"] < 0
            break
        oracle.step(lambda net: net(X), loss_fn)
        for key, value in oracle.log[-1].items():
            assert stats[key].item() == pytest.approx(value, rel=1e-7, abs=1e-10), key
    assert stats["skipped_steps"] == 0


@pytest.mark.parametrize("name", CONVEX | NOT_CONVEX)
def test_against_dense_matrices(name: str) -> None:
    check(net_of(), (CONVEX | NOT_CONVEX)[name], "auto")


@pytest.mark.parametrize("curvature", ["linearize", "forward", "double_backward"])
@pytest.mark.parametrize("name", ["huber_loss", "kl_div", "InfoNCE", "focal loss", "norm"])
def test_by_every_method(name: str, curvature: str) -> None:
    check(net_of(), (CONVEX | NOT_CONVEX)[name], curvature)


@pytest.mark.parametrize("name", IN_THE_MODEL)
def test_probabilities_from_the_model(name: str) -> None:
    last, loss_fn = IN_THE_MODEL[name]
    check(net_of(last), loss_fn, "auto")


@pytest.mark.parametrize("name", CONVEX)
def test_convex_losses_take_no_safe_step(name: str) -> None:
    net = net_of()
    optimizer = CurveBall(net.parameters())
    losses = [float(optimizer.step(lambda: net(X), CONVEX[name])[0]) for _ in range(12)]
    assert optimizer.stats()["safe_steps"] == optimizer.stats()["skipped_steps"] == 0
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", REPLACED)
def test_what_cannot_be_differentiated_twice_is_refused_with_a_replacement(name: str) -> None:
    loss_fn, advice, replacement = REPLACED[name]
    net = net_of()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=rf"cannot be differentiated twice.*{advice}"):
        CurveBall(net.parameters()).step(lambda: net(X), loss_fn)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    if name != "multilabel_margin_loss":  # where it is another loss
        torch.testing.assert_close(replacement(net(X)), loss_fn(net(X)))
    check(net, replacement, "auto")


def test_connectionist_temporal_classification_as_documented() -> None:
    """Of several lengths, repeated labels and another blank, as torch's, with its gradient."""
    logits = torch.randn(9, 5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 1, 2], [0, 2, 0], [2, 2, 2], [1, 0, 0], [0, 1, 2]])
    lengths = torch.tensor([9, 7, 8, 5, 9]), torch.tensor([3, 3, 3, 1, 2])
    losses = [loss(logits.log_softmax(2), labels, *lengths, blank=3) for loss in (documented("ctc"), F.ctc_loss)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses))
