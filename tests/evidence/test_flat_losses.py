"""The evidence of losses without curvature: what is trained is what the page says."""

from __future__ import annotations

import math

import pytest

from benchmarks.evidence import flat_losses


@pytest.mark.parametrize("loss", ["`F.l1_loss`", "the same, `sum`"])
def test_losses_without_curvature_fall_with_the_substitute(loss: str) -> None:
    first, _, last = flat_losses.train(loss, flat_losses.CURVEBALL)
    assert last < first / 2
    assert flat_losses.train(loss, flat_losses.GRADIENT_DESCENT)[0] == pytest.approx(first)


def test_a_loss_that_has_diverged_has_no_digits() -> None:
    cells = [flat_losses._text(loss) for loss in (None, math.inf, 1e101, 0.12345)]
    assert cells == ["not finite", "not finite", "above 1e+100", "0.123"]
