"""What `make gpu` measures of the metric, on a CPU and tiny: that it measures what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def benchmarks_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.parametrize("name", ["QR", "Cholesky-QR, twice, float64"])
def test_refreshes_find_the_eigenvectors(name: str) -> None:
    from benchmarks.refreshes import WAYS, quality

    found = quality(WAYS[name], 2, 8, CPU)
    assert found.from_start < 1e-5 and found.off_diagonal < 0.05


def test_the_nearest_orthogonal_matrix_is_no_refresh() -> None:
    """That of (F + δ) Q is Q, so products of matrices alone, such as Newton-Schulz, cannot take the place of QR."""
    from benchmarks.refreshes import WAYS, quality, side
    from curveball_fused.preconditioners.bases import SHIFT

    factor, basis = (t.double() for t in side(1, 8, CPU, settled=True))
    shifted = factor + SHIFT * factor.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(8)
    u, _, vh = torch.linalg.svd(shifted @ basis)
    torch.testing.assert_close(u @ vh, basis, rtol=0, atol=1e-4)
    (name,) = (name for name in WAYS if name.startswith("Newton-Schulz"))
    assert quality(WAYS[name], 2, 8, CPU).off_diagonal > 0.05


def test_steps_are_timed_in_turns() -> None:
    from benchmarks.metric_steps import ADAMW, adamw, kronecker, rows
    from benchmarks.nets import Case

    net = torch.nn.Linear
    case = Case("tiny", lambda: net(6, 4), lambda batch: (torch.randn(batch, 6), torch.arange(batch) % 4), 8)
    steps = {ADAMW: adamw(case, torch.bfloat16), "Kronecker": kronecker(case, torch.bfloat16)}
    table = rows(steps, CPU, turns=2, turn=3)
    assert [row[""] for row in table] == [ADAMW, "Kronecker"]
    assert table[0]["mean step / AdamW's"] == table[0]["median step / AdamW's"] == 1 and table[0]["bar"] is None
    assert table[1]["ms"] > 0 and "mean ≤ 1.25" in table[1]["bar"]
    assert all(step().isfinite() for step in steps.values())


def test_the_large_nets_are_those_that_they_are_called() -> None:
    from benchmarks.large_nets import LARGE

    with torch.device("meta"):
        nets = {name: case.build() for name, case in LARGE.items()}
        outputs = [nets[name](case.data(2)[0]).shape for name, case in LARGE.items()]
    assert sum(p.numel() for p in nets["gpt2_small"].parameters()) == 124_439_808
    assert sum(p.numel() for p in nets["resnet50"].parameters()) == 25_557_032
    assert outputs == [(2 * 1024, 50257), (2, 1000)]
