"""The tangent of scaled dot-product attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from curveball_fused.ops import tangents as tangent_ops
from tests.helpers.tangent_cases import BACKENDS, DTYPES, assert_near, attention, attention_case, doubles, jvp

ATTENTION = [
    (2, 3, 5, 7, 4, 6),
    (1, 1, 1, 1, 1, 1),
    (2, 2, 65, 65, 64, 64),
    (1, 2, 130, 300, 33, 17),
    (1, 2, 200, 90, 16, 48),
    (1, 3, 90, 200, 16, 5),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", ATTENTION)
def test_attention(sizes: tuple[int, ...], is_causal: bool, dtype: torch.dtype, backend: str) -> None:
    case = attention_case(*sizes, dtype)
    wide = doubles(*case)
    out = attention(*wide[3:], None, is_causal, 0.3)
    result = tangent_ops.attention_tangent(*case, out.to(dtype), is_causal=is_causal, scale=0.3, backend=backend)
    truth = jvp(lambda q, k, v: attention(q, k, v, None, is_causal, 0.3), wide[3:], wide[:3])
    assert_near(result, truth)
    assert result.transpose(1, 2).is_contiguous()


def masks(b: int, h: int, t: int, s: int) -> dict[str, Tensor]:
    numbers = torch.randn(b, h, t, s, dtype=torch.float64)
    rows = numbers.masked_fill(torch.rand(b, h, t, s) < 0.4, -math.inf)
    rows[:, :, 1] = -math.inf
    rows[0, 0, 3, :-1] = -math.inf
    padding = torch.zeros(b, 1, 1, s, dtype=torch.float64)
    padding[..., -s // 2 :] = -math.inf
    transposed = numbers.mT.contiguous().mT
    shared = torch.randn(t, s, dtype=torch.float64).expand(b, h, t, s)
    per_query = torch.randn(t, 1, dtype=torch.float64).expand(b, h, t, s)
    return dict(rows=rows, padding=padding.expand(b, h, t, s), transposed=transposed, shared=shared, query=per_query)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["rows", "padding", "transposed", "shared", "query"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_with_a_mask(is_causal: bool, kind: str, dtype: torch.dtype, backend: str) -> None:
    b, h, t, s, d, e = 2, 2, 40, 150, 8, 12
    mask = masks(b, h, t, s)[kind].to(dtype)
    case = attention_case(b, h, t, s, d, e, dtype)
    wide, whole = doubles(*case), mask.double()
    if is_causal:
        whole = whole + torch.full((t, s), -math.inf, dtype=torch.float64).triu(1)
    seen = (whole > -math.inf).any(-1, keepdim=True)  # torch's derivative of a row that is masked throughout is NaN
    safe = torch.where(seen, whole, 0.0)
    out = torch.where(seen, attention(*wide[3:], safe, False, 0.7), 0.0)
    truth = torch.where(seen, jvp(lambda q, k, v: attention(q, k, v, safe, False, 0.7), wide[3:], wide[:3]), 0.0)
    arguments = (*case, out.to(dtype), mask)
    result = tangent_ops.attention_tangent(*arguments, is_causal=is_causal, scale=0.7, backend=backend)
    assert kind != "rows" or not seen.all()
    assert_near(result, truth)


def test_attention_of_large_scores() -> None:
    """The largest score moves with every block of keys, far beyond what e^S could hold."""
    case = attention_case(1, 1, 20, 400, 8, 8, torch.float32)
    case[4] = case[4] * torch.linspace(1, 60, 400).view(-1, 1)
    wide = doubles(*case)
    out = attention(*wide[3:], None, False, 1.0)
    result = tangent_ops.attention_tangent(*case, out.float(), scale=1.0)
    truth = jvp(lambda q, k, v: attention(q, k, v, None, False, 1.0), wide[3:], wide[:3])
    # A score of 500 is right to 3e-5 in float32, and so are the exponentials.
    torch.testing.assert_close(result.double(), truth, rtol=0, atol=2e-4 * truth.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(0, 2, 3, 3, 4, 4), (1, 2, 0, 3, 4, 4), (1, 2, 3, 0, 4, 4)])
def test_attention_of_nothing(sizes: tuple[int, ...], backend: str) -> None:
    b, h, t, _, _, e = sizes
    result = tangent_ops.attention_tangent(
        *attention_case(*sizes, torch.float32), torch.zeros(b, h, t, e), scale=1.0, backend=backend
    )
    assert result.shape == (b, h, t, e) and not result.any()


def test_attention_hands_on_what_is_not_a_number() -> None:
    case = attention_case(1, 1, 4, 6, 4, 4, torch.float32)
    case[3][0, 0, 2, 1] = math.nan
    out = attention(*case[3:], None, False, 1.0)
    result = tangent_ops.attention_tangent(*case, out, scale=1.0)
    assert result[0, 0, 2].isnan().all() and result[0, 0, [0, 1, 3]].isfinite().all()
