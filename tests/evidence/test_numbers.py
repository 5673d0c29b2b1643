"""Figures in the text of README and docs: what looks measured comes of the raw data, or is named in `other_numbers`.

A number looks measured if it has a decimal point or an exponent, stands before a unit of time, memory or share, is
"N of M", or says how many times as long or as much. Not looked at are code, links, tables that the raw data fill,
versions, sizes such as 3 x 3, and what stands behind a sign (λ = 1, γ < 0.5), which defines or bounds.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.evidence.sentences import sentences
from tests.evidence.other_numbers import OTHER_NUMBERS

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))}

_WORD = "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|fifty|a hundred"
_UNIT = "%|x|µs|ms|s|seconds?|milliseconds?|minutes?|hours?|bytes|KiB|MiB|GiB|MB|GB|times"
_AS = "as (?:long|fast|quick|slow|much|many)"
MEASURED = re.compile(
    r"(?<![\w.,/])(?<![=<>≤≥←] )(?:"
    rf"\d[\d,]*(?:\.\d+(?:e[-+]?\d+)?|e-?\d+)(?: (?:{_UNIT})(?!\w))?"  # 0.5, 1e-9, 6.1e130, 0.5 ms
    rf"|\d[\d,]* ?(?:{_UNIT})(?!\w| ?\d)"  # 5 ms and 7 %, but not 3 x 3
    r"|\d[\d,]* of (?:the )?\d+"
    rf"|(?:{_WORD}) (?:times {_AS}|milliseconds|seconds|minutes|hours)"
    rf"|twice {_AS})"
)
VERSION = re.compile(
    r"(?:torch|Python|CUDA|Triton|transformers|timm|CycloneDX|arXiv)(?:,? (?:≥ |in |from |to |and |or )?\d+\.\d+)+"
)
BLOCKS = (
    re.compile(r"<!-- table (\S+) -->.*?<!-- end of table -->|<!--.*?-->", re.DOTALL),
    re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE),
    re.compile(r"(?<=\n\n)(?: {4}[^\n]*\n)(?: {4}[^\n]*\n|\n)*"),
)
INLINE = re.compile(r"`[^`]*`"), re.compile(r"\]\([^)]*\)"), re.compile(r"https?://\S+"), VERSION


def flat(page: str) -> str:
    """The text of a page in one line, without code blocks, comments and tables of the raw data."""
    for block in BLOCKS:
        page = block.sub("\n", page)
    return " ".join(page.split())


def measured(text: str) -> list[str]:
    """The numbers that look measured, with some words around them."""
    for code in INLINE:
        text = code.sub("`", text)
    return [text[max(0, found.start() - 40) : found.end() + 20] for found in MEASURED.finditer(text)]


def read(page: str) -> str:
    return flat((ROOT / page).read_text(encoding="utf-8"))


def named(page: str) -> list[str]:
    return [phrase for phrases in OTHER_NUMBERS.get(page, {}).values() for phrase in phrases]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_all_figures_are_computed_or_named(page: str) -> None:
    text = read(page)
    for known in (*sentences().get(page, ()), *named(page)):
        text = text.replace(known, "…", 1)  # the same words may stand elsewhere with a number that nobody knows
    found = measured(text)
    heading = "neither computed in benchmarks/evidence/sentences.py nor named in tests/evidence/other_numbers.py:"
    assert not found, "\n".join((heading, *found))


@pytest.mark.parametrize("page", OTHER_NUMBERS)
def test_what_is_named_stands_on_the_page(page: str) -> None:
    text = read(page)
    assert not [phrase for phrase in named(page) if phrase not in text or not measured(phrase)]


@pytest.mark.parametrize(
    "text",
    [
        "it takes 3.7 ms",
        "a loss of 0.5",
        "an error of 6e-16",
        "| 1.36 |",
        "0.6 ± 0.1 (0.4-0.9)",
        "in 12 minutes",
        "12 % off",
        "on 3 of 50",
        "on 3 of the 50",
        "2x faster",
        "1,077,360 bytes",
        "seven times as long",
        "twice as fast",
    ],
)
def test_looks_measured(text: str) -> None:
    assert measured(text)


@pytest.mark.parametrize(
    "text",
    ["`lr=0.1`", "[here](a/0.5.png)", "λ = 0.5", "γ < 0.5", "torch 2.11 and 2.13", "3 x 3", "5x5", "steps 1 to 20"],
)
def test_looks_not_measured(text: str) -> None:
    assert not measured(text)


def test_blocks_are_left_out() -> None:
    page = "a\n\n    0.5\n\n    0.6\n\n```\n0.7\n```\n<!-- table a -->\n\n| 0.8 |\n\n<!-- end of table -->\nb 1\n"
    assert flat(page) == "a b 1"
