"""What `precondition_in_bases` and `update_statistics_` refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from curveball_fused import ops
from tests.helpers.bases_cases import (
    NAN,
    every_backend,
    native_only,
    number,
    scalars,
)


@every_backend
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(decay=1.0), "decay must be at least 0"),
        (dict(decay=NAN), "decay must be at least 0"),
        (dict(left=[]), r"left must have an entry for each of 1 tensors; it has 0"),
        (dict(right=[None, None]), r"right must have an entry"),
        (dict(left=[torch.eye(4)]), r"left\[0\] is \[4, 4\]; for the side of 3"),
        (dict(right=[torch.eye(3)]), r"right\[0\] is \[3, 3\]; for the side of 4"),
        (dict(left=[torch.ones(3)]), r"left\[0\] is \[3\]"),
        (dict(left=[torch.ones(3, 3, 3, 3)]), r"left\[0\] is"),
        (dict(left=[torch.ones(2, 1, 1)]), r"left\[0\] is"),
        (dict(left=[torch.ones(3, 2, 2)]), r"left\[0\] is"),
        (dict(left=[torch.ones(1, 3, 4)]), r"left\[0\] is"),
        (dict(left=[torch.ones(2, 0, 0)]), r"left\[0\] is"),
        (dict(r=[torch.ones(4, 3)]), r"\(3, 4\).*\(4, 3\)"),
        (dict(r=[]), "same length"),
    ],
    ids=str,
)
def test_bad_arguments(backend: str, changes: dict[str, Any], words: str) -> None:
    v, r, weight = [torch.ones(3, 4)], [torch.ones(3, 4)], number(0.1)
    sides: dict[str, Any] = dict(left=[torch.eye(3)], right=[torch.eye(4)], decay=0.9, backend=backend)
    sides |= {name: value for name, value in changes.items() if name != "r"}
    r = changes.get("r", r)
    with pytest.raises(ValueError, match=words):
        ops.precondition_in_bases(v, r, None, weight, eps=1e-8, **sides)
    with pytest.raises(ValueError, match=words):
        ops.update_statistics_(v, r, r, scalars(), weight, gather=True, **sides)


@every_backend
@pytest.mark.parametrize("shape", [(4,), (), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("basis", [torch.eye(1), torch.eye(4), torch.ones(0, 4, 4), torch.ones(1, 4, 4)])
def test_what_is_no_matrix_or_empty_has_no_sides(backend: str, shape: tuple[int, ...], basis: Tensor) -> None:
    for sides in (dict(left=[basis], right=[None]), dict(left=[None], right=[basis])):
        with pytest.raises(ValueError, match=r"\[0\] is .* for the side of 0"):
            ops.precondition_in_bases(
                [torch.ones(shape)], [torch.ones(shape)], None, number(0.1), decay=0.9, eps=1e-8, backend=backend,
                **sides,
            )  # fmt: skip


@every_backend
def test_a_basis_of_another_dtype_is_refused(backend: str) -> None:
    with pytest.raises(RuntimeError):
        ops.precondition_in_bases(
            [torch.ones(4, 4)], [torch.ones(4, 4)], None, number(0.1), left=[torch.eye(4).double()], right=[None],
            decay=0.9, eps=1e-8, backend=backend,
        )  # fmt: skip


@native_only
def test_bad_arguments_of_the_native_operators() -> None:
    """Called directly they refuse what would read or write beyond a tensor."""
    t, q, w = [torch.ones(3, 4)], [torch.eye(3), torch.eye(4)], number(0.1)
    direction, statistics = (
        torch.ops.curveball_fused.precondition_in_bases,
        torch.ops.curveball_fused.update_statistics_,
    )
    wide = [torch.ones(3, 8)[:, ::2]]
    for arguments, words in (
        ((t, t, t, t, [], q[:1], [3], w, 0.9, 1e-8), "bases has 1 tensors but sides asks for 2"),
        ((t, t, t, t, [], q, [4], w, 0.9, 1e-8), "sides has an entry of 4"),
        ((t, t, t, t, [], q, [-1], w, 0.9, 1e-8), "sides has an entry of -1"),
        ((t, t, t, t, [], q, [1], w, 0.9, 1e-8), "bases has 2 tensors but sides asks for 1"),
        ((t, t, t, t, [], q[::-1], [3], w, 0.9, 1e-8), r"bases\[0\] does not fit a side of 3"),
        ((t, t, t, t, [], [torch.eye(3)[None], q[1]], [3, 0], w, 0.9, 1e-8), "v has 1 tensors but sides has 2"),
        ((t, t, t, t, [], [torch.eye(2)[None], q[1]], [3], w, 0.9, 1e-8), r"bases\[0\] does not fit"),
        ((t, t, t, t, [], [torch.eye(3)[None, None], q[1]], [3], w, 0.9, 1e-8), "two or three dimensions"),
        ((t, t, t, t, [], [q[0].double(), q[1]], [3], w, 0.9, 1e-8), r"bases\[0\] must be contiguous float32"),
        ((t, t, t, t, [], [torch.ones(3, 6)[:, ::2], q[1]], [3], w, 0.9, 1e-8), r"bases\[0\] must be contiguous"),
        ((t, t, t, wide, [], q, [3], w, 0.9, 1e-8), "laid out differently"),
        ((t, wide, t, t, [], q, [3], w, 0.9, 1e-8), "laid out differently"),
        ((t, t, t, [torch.ones(3, 4).half()], [], q, [3], w, 0.9, 1e-8), r"r\[0\] must have the dtype of v"),
        ((t, t, t, [torch.ones(3)], [], q, [3], w, 0.9, 1e-8), "different sizes"),
        ((t, t, [torch.ones(3, 4).half()], t, [], q, [3], w, 0.9, 1e-8), "convert it to float32 or float64"),
        ((t, t, t, t, t * 2, q, [3], w, 0.9, 1e-8), "z has 2"),
        ((t, t, t, t, [], q, [3], w, 1.0, 1e-8), "decay"),
    ):
        with pytest.raises(RuntimeError, match=words):
            direction(*arguments)
    for arguments, words in (
        ((t, t, q[:1], t, [3], w, 0.9, scalars(), True), "factors has 1 tensors but sides asks for 2"),
        ((t, t, q[::-1], t, [3], w, 0.9, scalars(), True), r"factors\[0\] does not fit"),
        ((t, t, q, wide, [3], w, 0.9, scalars(), True), "laid out differently"),
        ((t, t, q, t, [3], w, 0.9, scalars()[:3], True), "scalars must be"),
        ((t, t, q, t, [3], w.float(), 0.9, scalars(), True), "weight has dtype"),
    ):
        with pytest.raises(RuntimeError, match=words):
            statistics(*arguments)
