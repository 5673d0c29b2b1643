"""The fuzzer: a few hundred cases without a fault, and faults that it must see."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.evidence import fuzz
from tests.helpers.training import NATIVE

pytestmark = pytest.mark.skipif(not NATIVE, reason="compares the native library with plain torch")


@pytest.mark.parametrize("kind", fuzz.KINDS)
@pytest.mark.filterwarnings("ignore")
def test_random_arguments_are_computed_or_refused(kind: str) -> None:
    made = fuzz.block(kind, 1000, 60)
    assert made["faults"] == []
    assert made["worked"] and made["refused"]
    assert made["worked"] + made["refused"] + made["refused by one backend"] == 60


def doubled(x: torch.Tensor, *, backend: str) -> torch.Tensor:
    return x * (2 if backend == "cpu" else 2.5)


def spoils(x: torch.Tensor, *, backend: str) -> torch.Tensor:
    x.zero_()
    raise ValueError("too late")


def silent(x: torch.Tensor, *, backend: str) -> torch.Tensor:
    raise ValueError


def other_error(x: torch.Tensor, *, backend: str) -> torch.Tensor:
    raise AttributeError("no such thing")


@pytest.mark.parametrize(
    ("function", "words"),
    [(doubled, "is off by"), (spoils, "changed its"), (silent, "said nothing"), (other_error, "AttributeError")],
)
def test_faults_are_seen(function: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fuzz.KINDS, "planted", (lambda draw: (function, [torch.ones(3)], {}), 1))
    made = fuzz.block("planted", 0, 1)
    assert made["fault"] == 1 and words in made["faults"][0]
