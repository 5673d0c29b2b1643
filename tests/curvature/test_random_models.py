"""Random models: three steps equal those of dense matrices, or are refused; never anything else."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor, nn

from curveball_fused import CurveBall
from tests.helpers.oracle import DenseCurveBall
from tests.helpers.random_models import X, model_of, programs

Y = torch.tensor([0, 2, 1, 2])


def mean_square(out: Tensor) -> Tensor:
    return (out - 0.3).square().mean()


def cross_entropy(out: Tensor) -> Tensor:
    return F.cross_entropy(out, Y)


def run(net: nn.Module) -> Tensor:
    with torch.enable_grad():  # for models that differentiate inside
        return net(X)


@given(programs, st.integers(0, 3), st.sampled_from((mean_square, cross_entropy)))
def test_right_or_refused(program: list[Any], seed: int, loss_fn: Any) -> None:
    net = model_of(program, seed)
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    copied = copy.deepcopy(net)
    for module in copied.modules():
        module.checkpointed = False  # the truth takes many backward passes
    truth = DenseCurveBall(copied, [names], [0.8], [0.01], 3.0, 0.6, 1.2, 0.9, 2)
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = CurveBall(
        params,
        lr=0.8,
        weight_decay=0.01,
        lambd=3.0,
        lambda_low=0.6,
        lambda_high=1.2,
        lambda_factor=0.9,
        lambda_interval=2,
    )
    for step in range(3):
        torch.manual_seed(step)
        loss, outputs = truth.step(run, loss_fn)
        torch.manual_seed(step)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = optimizer.step(lambda: net(X), loss_fn)
        except RuntimeError as error:
            assert "cannot follow this model" in str(error), error
            event("refused")
            return
        if not torch.stack([loss, torch.tensor(truth.log[-1]["predicted_change"])]).isfinite().all():
            return
        stats = optimizer.stats()
        ours = torch.stack([found[0], stats["beta"], stats["rho"], stats["lambd"]]).double()
        expected = torch.tensor([float(loss), *(truth.log[-1][key] for key in ("beta", "rho", "lambd"))]).double()
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found[1], outputs, rtol=1e-6, atol=1e-8)
    for (name, ours), theirs in zip(net.state_dict().items(), truth.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
