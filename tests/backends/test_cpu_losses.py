"""The loss kernels for the CPU: what belongs to a CPU. See also test_native_losses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused import CurveBall, backends
from curveball_fused.backends import native
from curveball_fused.backends.dtypes import compute_dtype
from tests.helpers import loss_cases
from tests.helpers.loss_cases import INFINITY, NAN
from tests.helpers.loss_truth import DTYPES, check_cross_entropy, every_dtype, triple
from tests.helpers.tiers import slow

if not backends.has_operators():
    pytest.skip("needs the native kernels", allow_module_level=True)

operators: Any = torch.ops.curveball_fused


@every_dtype
def test_many_blocks(dtype: torch.dtype) -> None:
    """Also rows that are longer than a block."""
    check_cross_entropy(operators, *triple((5000, 10), dtype), torch.randint(0, 10, (5000,)), label_smoothing=0.1)
    check_cross_entropy(operators, *triple((2, 50_257), dtype), torch.full((2,), 50_256))


@every_dtype
@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_infinite_logits_in_the_last_vector_make_the_loss_nan(dtype: torch.dtype, value: float) -> None:
    loss_cases.check_infinite_logits(operators, dtype, value, 17, 21)


@pytest.mark.parametrize("dtype", [torch.float32, *[slow(dtype) for dtype in DTYPES if dtype != torch.float32]])
def test_opcheck(dtype: torch.dtype) -> None:
    x, v, u = triple((4, 3), dtype)
    y, labels, w = torch.tensor([0, 2, 1, 1]), torch.rand(4, 3).to(dtype), torch.rand(3).to(compute_dtype(dtype))
    options, check = (-100, True, 0.1, 1.0), torch.library.opcheck
    check(operators.cross_entropy_cotangent.default, (x, v, y, w, *options))
    _, _, products, rows = operators.cross_entropy_cotangent(x, v, y, w, *options)
    check(operators.cross_entropy_products.default, (x, v, u, y, w, rows, products, *options))
    check(operators.mse_cotangent.default, (x, v, labels, True, 1.0))
    check(operators.mse_products.default, (x, v, u, labels, products, True, 1.0))
    check(operators.bce_cotangent.default, (x, v, labels, w, None, True, 1.0))
    check(operators.bce_products.default, (x, v, u, labels, None, w, products, True, 1.0))


# ---------------------------------------------------------------------------------------------- the same bits


def everything(dtype: torch.dtype) -> list[Tensor]:
    """Results of all operators, on tensors of several blocks."""
    torch.manual_seed(0)
    x, v, u = triple((700, 97), dtype)
    y, labels = torch.randint(-1, 97, (700,)), torch.rand(700, 97).to(dtype)
    w = (torch.rand(97) + 0.1).to(compute_dtype(dtype))
    results: list[Tensor] = []
    for weight, smoothing in ((None, 0.0), (w, 0.1)):
        options = -1, True, smoothing, -1.0
        results += operators.cross_entropy_cotangent(x, v, y, weight, *options)
        results.append(operators.cross_entropy_products(x, v, u, y, weight, results[-1], results[-2], *options))
    results += operators.mse_cotangent(x, v, labels, True, 1.0)
    results.append(operators.mse_products(x, v, u, labels, results[-1], True, 1.0))
    results += operators.bce_cotangent(x, v, labels, w, None, True, 1.0)
    results.append(operators.bce_products(x, v, u, labels, w, None, results[-1], True, 1.0))
    return results


@every_dtype
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    one, threads = everything(dtype), torch.get_num_threads()
    try:
        for n in (2, 3):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(one, everything(dtype), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", native.CPU.module.INSTRUCTION_SETS.split(","))
def test_the_same_bits_from_every_instruction_set(instruction_set: str, tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import torch; torch.set_num_threads(1)\n"
        "from tests.backends.test_cpu_losses import DTYPES, everything\n"
        f"torch.save([everything(dtype) for dtype in DTYPES], {str(tmp_path / 'results')!r})"
    )
    environment = os.environ | {"CURVEBALL_INSTRUCTION_SET": instruction_set, "CURVEBALL_REQUIRE_NATIVE": "1"}
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if "CURVEBALL_INSTRUCTION_SET names" in process.stderr:
        pytest.skip(f"this processor has no {instruction_set}")
    assert process.returncode == 0, process.stderr
    for dtype, theirs in zip(DTYPES, torch.load(tmp_path / "results"), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(everything(dtype), theirs, strict=True))


# ---------------------------------------------------------------------------------------------- how exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_and_log1p_to_a_few_units_in_the_last_place(dtype: torch.dtype) -> None:
    """sigmoid(-x) = e^-x / (1 + e^-x) is g for the target 0, whose loss is log(1 + e^x)."""
    x = torch.linspace(-80, 20, 4001, dtype=torch.float64).to(dtype)
    zero, epsilon = torch.zeros_like(x), torch.finfo(dtype).eps
    c = operators.bce_cotangent(x, zero, zero, None, None, False, 1.0)[1]
    exact = torch.sigmoid(x.double())
    assert ((c.double() - exact) / exact).abs().max() <= 4 * epsilon
    loss = torch.stack([operators.bce_cotangent(a, a, 0 * a, None, None, False, 1.0)[0] for a in x.view(-1, 1)[::10]])
    exact = F.softplus(x[::10].double(), threshold=100.0)
    assert ((loss - exact) / exact).abs().max() <= 6 * epsilon


# ---------------------------------------------------------------------------------------------- in a step


LABELS, INDEX = torch.rand(6, 5, dtype=torch.float64), torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda out: F.cross_entropy(out, INDEX),
        lambda out: F.mse_loss(out, LABELS),
        lambda out: F.binary_cross_entropy_with_logits(out, LABELS),
    ],
    ids=["cross entropy", "mse", "bce"],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_step_takes_them_and_goes_where_torch_goes(
    loss_fn: Any, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs that are not contiguous, too."""
    x, start = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    calls: list[str] = []
    original = backends.loss_kernels
    monkeypatch.setattr(backends, "loss_kernels", lambda chosen: calls.append(chosen) or original(chosen))

    def train(backend: str) -> tuple[Tensor, Tensor]:
        w = torch.nn.Parameter(start.clone())
        optimizer = CurveBall([w], backend=backend)
        for _ in range(4):
            loss, _ = optimizer.step(lambda: (w @ x.T).T if transposed else x @ w.T, loss_fn)
        return w.detach(), loss

    torch.testing.assert_close(train("cpu"), train("torch"), rtol=1e-10, atol=1e-12)
    assert len(calls) == 8 and set(calls) == {"cpu"}
