"""A sweep over torch's operators: a step with any of them is right or refused by the operator's name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.helpers.operator_samples import CRASHED, REFUSED, WRONG, followed_by, operators, outcome, samples

PARTS, SAMPLES = 16, 2
TABLE = Path(__file__).parents[2] / "docs" / "operators.md"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
def test_right_or_refused(part: int, in_place: bool) -> None:
    pytest.importorskip("expecttest")  # which torch's samples need
    wrong, steps = [], 0
    for op in operators()[part::PARTS]:
        for sample in samples(op, SAMPLES, in_place):
            found = outcome(sample)
            steps += found is not None
            if found and (found.kind in (WRONG, CRASHED) or (found.kind == REFUSED and not found.named)):
                wrong.append(f"{sample}: {found.kind}: {found.reason}")
    assert not wrong, "\n".join(wrong)
    assert steps > (5 if in_place else 40)


def sections() -> dict[str, str]:
    """The paragraphs of the table that list operators, by their titles."""
    _, *parts = re.split(r"^## ", TABLE.read_text(), flags=re.MULTILINE)
    return {title: text for title, _, text in (part.partition("\n") for part in parts)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("nn.functional.gelu", "Own rules"),
        ("cdist", "Own rules"),
        ("sinc", "torch's forward mode"),
        ("linalg.cholesky", "Its own backward pass, differentiated"),
        ("nn.functional.ctc_loss", "Refused"),
    ],
)
def test_the_table_in_the_docs_is_of_this_code(name: str, title: str) -> None:
    pytest.importorskip("expecttest")
    assert f"`{name}`" in sections()[title]
    assert not any(f"`{name}`" in text for other, text in sections().items() if other != title)
    found = [op for op in operators() if op.name == name]
    if torch.__version__.partition("+")[0] not in TABLE.read_text():
        pytest.skip("docs/operators.md is of another torch: `python -m tools.operator_table 2` writes it for this one")
    sample = next(samples(found[0], 1))
    if title == "Refused":
        refusal = outcome(sample)
        assert refusal is not None and refusal.kind == REFUSED and refusal.named
    else:
        assert followed_by(sample) == {
            "Own rules": "own rule",
            "torch's forward mode": "dual numbers",
            "Its own backward pass, differentiated": "double backward",
        }[title]  # fmt: skip
