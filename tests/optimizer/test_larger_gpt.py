"""A GPT of four layers on real text: a batch in which attention is sharp must not hold β down for the next hundred."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from curveball_fused import CurveBall
from curveball_fused.backends.scalars import AVERAGE_BETA

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_gpt_of_four_layers_learns_and_keeps_its_beta(monkeypatch: pytest.MonkeyPatch) -> None:
    """With averages of systems in the place of β and ρ, β fell to 1e-4 in this net and its loss stayed above 2.6."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.economy import source_text
    from benchmarks.transformer_nets import GPT

    torch.manual_seed(0)
    net, (x, y) = GPT(128, 4, 4), source_text(Path())
    optimizer = CurveBall(net.parameters(), preconditioner="kronecker")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    losses, betas = [], []
    for rows in order.repeat(2).split(32)[:80]:
        loss, _ = optimizer.step(
            lambda rows=rows: net(x[rows]), lambda out, rows=rows: F.cross_entropy(out, y[rows].flatten())
        )
        losses.append(float(loss))
        betas.append(float(optimizer._shared["scalars"][AVERAGE_BETA]))  # type: ignore[index]
    assert sum(losses[-10:]) / 10 < 2.2
    assert min(betas) > 1e-3
