"""Write docs/operators.md: by which way each of torch's operators is followed, from torch's own samples of it.

    python -m tools.operator_table [samples of each operator]

Exits with an error where a step with an operator is wrong, or fails without naming it.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import torch

from curveball_fused.curvature.call_maps import REPLACEMENTS
from tests.helpers.operator_samples import CRASHED, REFUSED, WRONG, followed_by, operators, outcome, samples

PATH = Path(__file__).parents[1] / "docs" / "operators.md"
SAMPLES = 8
TITLES = {
    "own rule": "Own rules",
    "dual numbers": "torch's forward mode",
    "double backward": "Its own backward pass, differentiated",
    "linearize_operators": "The tape of operators",
    "another method": "By another method",
    REFUSED: "Refused",
}
TEXTS = {
    "own rule": "The fastest: the tangent reads what the call has computed, or the call is composed of such.",
    "dual numbers": "The tape runs the call once more for each tangent, on dual numbers.",
    "double backward": (
        "torch's forward mode lacks the operator, loses its tangent, or contradicts its backward pass; the tape "
        "differentiates the backward pass of this one call."
    ),
    "linearize_operators": (
        "The tape of functions cannot follow the call, most often as it writes to its argument; a tape of the "
        "operators that the whole model comes down to does."
    ),
    "another method": (
        "Neither tape can follow the call; the whole model is followed by dual numbers or, failing that, double "
        "backward."
    ),
    REFUSED: "torch cannot differentiate these twice. The error names the operator and, where there is one, a way out.",
}
HEAD = """# Operators

By which way a step follows each of torch's operators that have a gradient: written by
`python -m tools.operator_table`, from {samples} samples that torch's own tests have for them (torch {version}, CPU,
float64). Each sample was a small model, trained for three steps by `curvature="auto"` and compared with explicit
matrices: {followed} were right, {refused} were refused by name, and wrong: {wrong}. An operator whose samples differ
stands where the slowest of them belongs. Your own model: [Checking a model](checking-a-model.md).
"""


def ways(most: int, failures: list[str]) -> tuple[dict[str, str], int, int]:
    """The slowest way of each operator; how many samples were followed, how many refused. Adds to `failures`."""
    slowness, found, followed, refused = list(TITLES), {}, 0, 0
    for op in operators():
        for in_place in (False, True):
            for sample in samples(op, most, in_place):
                result = outcome(sample)
                if result is None:
                    continue
                if result.kind in (WRONG, CRASHED) or (result.kind == REFUSED and not result.named):
                    failures.append(f"{sample}: {result.kind}: {result.reason}")
                    continue
                followed, refused = followed + (result.kind != REFUSED), refused + (result.kind == REFUSED)
                way = REFUSED if result.kind == REFUSED else followed_by(sample)
                way = way if way in TITLES else "another method"
                found[sample.operator] = max(way, found.get(sample.operator, way), key=slowness.index)
    return found, followed, refused


def paragraph(names: Iterable[str]) -> str:
    return textwrap.fill(", ".join(f"`{name}`" for name in sorted(names)), 120, break_on_hyphens=False)


def main() -> None:
    torch.set_num_threads(1)
    failures: list[str] = []
    found, followed, refused = ways(int(sys.argv[1]) if len(sys.argv) > 1 else SAMPLES, failures)
    wrong = ", ".join(sorted({f"`{failure.partition(',')[0]}`" for failure in failures})) or "none"
    version = torch.__version__.partition("+")[0]
    text = HEAD.format(
        samples=followed + refused + len(failures), version=version, followed=followed, refused=refused, wrong=wrong
    )
    for way, title in TITLES.items():
        names = [name for name, by in found.items() if by == way]
        if names:
            text += f"\n## {title}\n\n{textwrap.fill(TEXTS[way], 120)}\n\n{paragraph(names)}\n"
    text += "\n## Instead of\n\n| operator | use |\n|---|---|\n"
    text += "".join(f"| `{name}` | {instead} |\n" for name, instead in REPLACEMENTS.items())
    PATH.write_text(text)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
