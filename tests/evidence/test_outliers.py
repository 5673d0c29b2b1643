"""The evidence of batches with outliers: what is trained is what the page says."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.evidence import outliers
from benchmarks.evidence.outliers import BATCH, EVERY, FACTOR, batches


def test_one_batch_in_fifty_is_an_outlier() -> None:
    data = outliers.digits()
    none, right, wrong = (list(batches(data, 0, kind)) for kind in outliers.OUTLIERS)
    odd = [i for i, (_, _, factor) in enumerate(wrong) if factor != 1]
    assert odd == list(range(EVERY // 2, len(wrong), EVERY)) and {wrong[i][2] for i in odd} == {FACTOR}
    for i, ((x, y, _), (same_x, same_y, _), (again_x, drawn, _)) in enumerate(zip(none, right, wrong, strict=True)):
        assert x.shape == (BATCH, 64) and torch.equal(x, same_x) and torch.equal(x, again_x)
        assert torch.equal(y, same_y) and torch.equal(y, drawn) == (i not in odd)


@pytest.mark.parametrize("method", outliers.METHODS)
def test_every_method_learns(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outliers, "STEPS", 20)
    assert outliers.final_loss(method, outliers.digits(), 0, "none") < math.log(10) - 0.1
