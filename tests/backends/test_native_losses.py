"""The native loss kernels, in the library for the CPU and of the emulated GPU: against torch and closed forms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from curveball_fused import backends
from curveball_fused.backends.dtypes import compute_dtype
from tests.helpers import emulated, loss_cases
from tests.helpers.loss_cases import INFINITY, NAN
from tests.helpers.loss_truth import (
    DTYPES,
    check_cross_entropy,
    check_elements,
    check_errors,
    cross_entropy,
    every_dtype,
    places,
    signs,
    triple,
)


class Native(NamedTuple):
    operators: Any
    device: Any  # the emulated GPU; None: the CPU itself

    def set(self, seed: int, threads: int, max_shared_bytes: int = 10**5) -> None:
        """How the GPU runs what follows; at most three blocks are launched here, so that each takes several rows."""
        if self.device is not None:
            self.device.set_seed(seed)
            self.device.set_threads(threads)
            self.device.set_max_shared_bytes(max_shared_bytes)


@pytest.fixture(scope="session", params=["CPU", "emulated GPU"])
def native(request: pytest.FixtureRequest) -> Native:
    if request.param == "emulated GPU":
        return Native(emulated.operators, request.getfixturevalue("device"))
    if not backends.has_operators():
        pytest.skip("needs the native kernels")
    return Native(torch.ops.curveball_fused, None)


@pytest.fixture
def operators(native: Native) -> Any:
    return native.operators


@pytest.fixture(autouse=True)
def fresh(native: Native) -> Iterator[None]:
    if native.device is None:
        yield
    else:
        yield from emulated.fresh(native.device)


@given(
    classes=st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 96, 1000, 1025, 5000]),
    rows=st.one_of(st.integers(1, 9), st.just(40)),
    dtype=st.sampled_from(DTYPES),
    where=places,
    weighted=st.booleans(),
    ignored=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    sign=signs,
    launched=st.tuples(
        st.integers(0, 1000), st.sampled_from([0, 0, 32, 128, 512, 1024]), st.sampled_from([4096, 10**5])
    ),
    seed=st.integers(0, 1000),
)
def test_cross_entropy(
    native: Native,
    classes: int,
    rows: int,
    dtype: torch.dtype,
    where: tuple[int, int, int],
    weighted: bool,
    ignored: bool,
    smoothing: float,
    reduction: str,
    sign: float,
    launched: tuple[int, int, int],
    seed: int,
) -> None:
    """Classes around the sizes of vectors and teams, arrays misaligned alike or not, all options."""
    native.set(*launched)
    torch.manual_seed(seed)
    target, options = loss_cases.random_targets(classes, rows, dtype, weighted, ignored)
    options |= dict(reduction=reduction, label_smoothing=smoothing)
    check_cross_entropy(native.operators, *triple((len(target), classes), dtype, where), target, sign, **options)


@given(
    rows=st.integers(1, 5),
    columns=st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 100, 1027]),
    dtype=st.sampled_from(DTYPES),
    where=places,
    reduction=st.sampled_from(["mean", "sum"]),
    sign=signs,
    weight=st.sampled_from([None, (1,), (0,), (0, 1)]),
    pos_weight=st.sampled_from([None, (1,), (0, 1)]),
    launched=st.tuples(st.integers(0, 1000), st.sampled_from([0, 32, 128])),
    seed=st.integers(0, 1000),
)
def test_elementwise_losses(
    native: Native,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    where: tuple[int, int, int],
    reduction: str,
    sign: float,
    weight: tuple[int, ...] | None,
    pos_weight: tuple[int, ...] | None,
    launched: tuple[int, int],
    seed: int,
) -> None:
    native.set(*launched)
    torch.manual_seed(seed)
    weights = loss_cases.random_weights(rows, columns, dtype, weight=weight, pos_weight=pos_weight)
    check_elements(native.operators, (rows, columns), dtype, where, sign, reduction=reduction, **weights)


@every_dtype
def test_many_elements(operators: Any, dtype: torch.dtype) -> None:
    """More than all blocks take at once, and rows that are longer than a block."""
    pos_weight = torch.rand(40_003).to(compute_dtype(dtype))
    check_elements(operators, (3, 40_003), dtype, (0, 0, 0), 1.0, reduction="mean", pos_weight=pos_weight)


@pytest.mark.slow
@every_dtype
@pytest.mark.parametrize("classes, rows", [(50_257, 2), (131_075, 1)])
def test_very_many_classes(operators: Any, dtype: torch.dtype, classes: int, rows: int) -> None:
    """Rows longer than a block and than shared memory, and a target in the last, single element."""
    target = torch.full((rows,), classes - 1)
    check_cross_entropy(operators, *triple((rows, classes), dtype), target)
    options: dict[str, Any] = dict(label_smoothing=0.1, reduction="sum")
    check_cross_entropy(operators, *triple((rows, classes), dtype), target, -1.0, **options)


def test_cross_entropy_is_what_autograd_makes_of_torchs(operators: Any) -> None:
    """Without `closed_form_losses`: the gradient, and the Hessian by double backward."""
    x, v, u = triple((5, 11), torch.float64)
    target, options = torch.randint(0, 11, (5,)), dict(weight=torch.rand(11).double(), label_smoothing=0.2)
    ours = cross_entropy(operators, x, v, u, target, **options)
    x.requires_grad_()
    loss = F.cross_entropy(x, target, **options)  # type: ignore[arg-type]
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    hv, hu = (torch.autograd.grad(g, x, t, retain_graph=True)[0] for t in (v, u))
    expected = torch.stack([(a * b).sum() for a, b in ((g, v), (v, hv), (g, u), (v, hu), (u, hu))])
    torch.testing.assert_close(ours, (loss, g + hv, expected), rtol=1e-12, atol=1e-14)


def test_what_the_operators_refuse(operators: Any) -> None:
    check_errors(operators)


# ---------------------------------------------------------------------------------------------- rows that are special


@every_dtype
@pytest.mark.parametrize("classes", [9, 1100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_rows_are_not_even_read(operators: Any, dtype: torch.dtype, classes: int, smoothing: float) -> None:
    loss_cases.check_ignored_rows(operators, dtype, classes, smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(3, 5), (3, 1100), (0, 5), (0, 0), (3, 0)])
def test_nothing_to_learn_from(operators: Any, shape: tuple[int, int], smoothing: float) -> None:
    loss_cases.check_nothing_to_learn_from(operators, shape, smoothing)


def test_no_elements(operators: Any) -> None:
    loss_cases.check_no_elements(operators)


@pytest.mark.parametrize("classes", [4, 1100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_zero(operators: Any, classes: int, smoothing: float) -> None:
    """A row of weight zero adds nothing; where all weights of the targets are zero, the mean is NaN."""
    weight = torch.ones(classes)
    weight[0] = 0
    x, v, u = triple((3, classes), torch.float32)
    options: dict[str, Any] = dict(weight=weight, label_smoothing=smoothing)
    check_cross_entropy(operators, x, v, u, torch.tensor([0, 1, 2]), **options)
    if not smoothing:
        ours = cross_entropy(operators, x, v, u, torch.zeros(3, dtype=torch.int64), **options)
        assert all(t.isnan().all() for t in ours)


@pytest.mark.parametrize("bad", [-1, 7, 2**40, -(2**62)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_target_that_is_no_class(operators: Any, bad: int, weighted: bool, smoothing: float) -> None:
    loss_cases.check_a_target_that_is_no_class(operators, bad, weighted, smoothing)


@every_dtype
@pytest.mark.parametrize("classes", [11, 40, 1100])
@pytest.mark.parametrize("mask", ["-inf", "lowest"])
@pytest.mark.parametrize("first", [False, True])
def test_masked_logits(operators: Any, dtype: torch.dtype, classes: int, mask: str, first: bool) -> None:
    loss_cases.check_masked_logits(operators, dtype, classes, mask, first)


@pytest.mark.parametrize("classes", [5, 40, 1100])
def test_a_row_that_is_all_masked(operators: Any, classes: int) -> None:
    loss_cases.check_a_row_that_is_all_masked(operators, classes)


@every_dtype
@pytest.mark.parametrize("shift", [1e4, -1e4])
@pytest.mark.parametrize("classes", [40, 1100])
def test_large_logits(operators: Any, dtype: torch.dtype, shift: float, classes: int) -> None:
    loss_cases.check_large_logits(operators, dtype, shift, classes)


@every_dtype
@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("place", [0, 5, -1])
@pytest.mark.parametrize("classes", [11, 21, 1100])
def test_infinite_logits_make_the_loss_nan(
    operators: Any, dtype: torch.dtype, value: float, place: int, classes: int
) -> None:
    loss_cases.check_infinite_logits(operators, dtype, value, place, classes)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_rounding_does_not_make_it_look_concave(operators: Any, offset: float) -> None:
    loss_cases.check_that_it_looks_convex(operators, offset)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, 1e-3, 30.0, -30.0, 80.0, -80.0, 100.0, -100.0, 1e4, -1e4])
def test_saturated_logits(operators: Any, value: float) -> None:
    loss_cases.check_saturated_logits(operators, value)
