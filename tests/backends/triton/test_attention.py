"""The tangent of attention in Triton against forward-mode autograd in float64: on a GPU, else by the interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from curveball_fused.backends.triton import tangents as triton_tangents
from tests.helpers.tiers import slow
from tests.helpers.triton_cases import DEVICE, INF, INTERPRETED, RUNTIME_WARNINGS, draw, two_dtypes_first
from tests.helpers.triton_cases import check_tangent as check

tl = pytest.importorskip("triton.language")
pytestmark = RUNTIME_WARNINGS


@pytest.fixture(autouse=True)
def dot_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as integers, which its tl.dot multiplies as such."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.create_fp_ext(t, tl.float32) for t in (a, b))
        return plain(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def attention(mask: Tensor | None, causal: bool, scale: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """In plain torch; queries that see nothing give zero."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = scale * (q @ k.mT)
        if mask is not None:
            scores = scores + mask.to(scores.dtype)
        if causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -INF)
        blind = (scores == -INF).all(-1, keepdim=True)
        return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0) @ v

    return function


def heads(length: int, width: int, dtype: torch.dtype) -> Tensor:
    """[2, 3, length, width], in memory as a projection leaves it."""
    return draw(2, length, 3, width, dtype=dtype).transpose(1, 2)


def check_attention(
    queries: int, keys: int, d: int, e: int, dtype: torch.dtype, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    q, dq, k, dk = (heads(length, d, dtype) for length in (queries, queries, keys, keys))
    v, dv, scale = heads(keys, e, dtype), heads(keys, e, dtype), 0.7 / math.sqrt(d)
    function = attention(mask, causal, scale)
    out = function(q.double(), k.double(), v.double()).to(dtype)
    expanded = None if mask is None else mask.expand(2, 3, queries, keys)
    got = triton_tangents.attention_tangent(dq, dk, dv, q, k, v, out, expanded, causal, scale)
    assert got.dtype == dtype and got.transpose(1, 2).is_contiguous()
    check(got, function, [q, k, v], [dq, dk, dv])
    return got


@two_dtypes_first
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "d", "e"),
    [(5, 7, 8, 8), (1, 1, 1, 1), slow(70, 40, 16, 20), (35, 67, 33, 16), slow(20, 20, 130, 140)],
)
def test_attention(queries: int, keys: int, d: int, e: int, causal: bool, dtype: torch.dtype) -> None:
    check_attention(queries, keys, d, e, dtype, causal=causal)


@two_dtypes_first
@pytest.mark.parametrize("shape", [(2, 3, 40, 70), slow((2, 1, 1, 70)), (40, 1), slow(())])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_masks(shape: tuple[int, ...], causal: bool, dtype: torch.dtype) -> None:
    """Added to the scores, some of minus infinity, any dimension expanded."""
    mask = draw(*shape, dtype=dtype)
    if len(shape) == 4:
        mask[..., 10:55] = -INF  # a whole block of keys, but for float64 and float32 more than one
        mask[..., 0] = 0.5
    check_attention(40, 70, 16, 8, dtype, mask, causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_queries_that_see_nothing(dtype: torch.dtype) -> None:
    mask = torch.zeros(2, 1, 9, 70, dtype=dtype, device=DEVICE)
    mask[1, 0, 4] = -INF
    mask[0, 0, :, :66] = -INF  # nothing in the first blocks
    got = check_attention(9, 70, 16, 16, dtype, mask)
    assert not got[1, :, 4].any() and got[1, :, 5].all()


def test_attention_of_large_scores() -> None:
    """One key takes all the weight: exp would overflow without the maximum."""
    q, dq, k, dk, v, dv = (heads(40, 16, torch.float64) for _ in range(6))
    function = attention(None, False, 100.0)
    got = triton_tangents.attention_tangent(dq, dk, dv, q, k, v, function(q, k, v), None, False, 100.0)
    check(got, function, [q, k, v], [dq, dk, dv])


def test_attention_of_any_strides() -> None:
    whole = draw(3, 2, 2, 20, 4, 16, dtype=torch.float64)
    q, k, v = whole[0, :, :, :, 0], whole[1, :, :, ::2, 1], whole[2, :, :, :10, 2].flip(1)
    dq, dk, dv = (torch.randn_like(t) for t in (q, k, v))
    function = attention(None, True, 0.25)
    got = triton_tangents.attention_tangent(dq, dk, dv, q, k, v, function(q, k, v), None, True, 0.25)
    check(got, function, [q, k, v], [dq, dk, dv])


def test_attention_of_nothing() -> None:
    for queries, keys in ((0, 4), (4, 0), (0, 0)):
        q, k = heads(queries, 8, torch.float32), heads(keys, 8, torch.float32)
        got = triton_tangents.attention_tangent(q, k, k, q, k, k, torch.zeros_like(q), None, False, 1.0)
        assert got.shape == q.shape and not got.any()
