"""`precondition_` on the GPU, against float64 arithmetic, over shapes, dtypes and layouts."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from curveball_fused import backends, ops
from curveball_fused.backends.reference import preconditioners as reference
from curveball_fused.preconditioners import Block, fresh_state, refresh
from curveball_fused.preconditioners.bases import refreshed
from tests.gpu.device import DEVICE, draw, every_backend, launches, resnet50, to_device
from tests.gpu.test_gpu_lists import LAYOUTS, SHAPES
from tests.helpers.diagonal_truth import DECAY, EPS, Precondition, check_precondition, exact, weight_of

COMBINATIONS = [(v, r) for v in (torch.float32, torch.float64) for r in (v, torch.float16, torch.bfloat16)]
every_combination = pytest.mark.parametrize(("v_dtype", "r_dtype"), COMBINATIONS, ids=str)
NAN, INF = float("nan"), float("inf")


def by(backend: str) -> Precondition:
    """The public operator, which makes u, as if u were given."""

    def run(
        u: list[Tensor],
        v: list[Tensor],
        r: list[Tensor],
        z: list[Tensor],
        weight: Tensor,
        decay: float,
        eps: float,
        scalars: Tensor | None,
    ) -> Tensor:
        made, sums = ops.precondition_(v, r, z, weight, decay=decay, eps=eps, scalars=scalars, backend=backend)
        for given, u_i in zip(u, made, strict=True):
            given.copy_(u_i)
        return sums

    return run


@every_backend
@pytest.mark.parametrize("seed", range(12))
def test_precondition(backend: str, seed: int) -> None:
    choose = random.Random(seed)
    u, v, r, z = [], [], [], []
    for _ in range(choose.randrange(1, 9)):
        shape, (v_dtype, r_dtype) = choose.choice(SHAPES), choose.choice(COMBINATIONS)
        u.append(torch.empty(shape, dtype=v_dtype, device=DEVICE))
        for tensors, numbers in (
            (v, draw(shape, v_dtype).abs()),
            (r, draw(shape, r_dtype)),
            (z, draw(shape, v_dtype)),
        ):
            tensors.append(LAYOUTS[choose.choice(list(LAYOUTS))](numbers))
    scalars = to_device(0.3, 0.8) if seed % 3 else None
    check_precondition(by(backend), u, v, r, z if seed % 2 else [], scalars)


@every_backend
@every_combination
def test_u_may_be_r(backend: str, v_dtype: torch.dtype, r_dtype: torch.dtype) -> None:
    """In place, where the dtypes allow it."""
    kernel = backends.preconditioner_kernels(backend).precondition_
    v, r, z = [draw((70_001,), v_dtype).abs()], [draw((70_001,), r_dtype)], [draw((70_001,), v_dtype)]
    u = r if r_dtype == v_dtype else [torch.empty_like(v[0])]
    check_precondition(kernel, u, v, r, z)


@every_backend
@every_combination
@pytest.mark.parametrize(("beta", "rho"), [(NAN, 0.9), (0.1, NAN), (INF, 0.9), (0.1, -INF)])
def test_a_skipped_step_keeps_v(
    backend: str, v_dtype: torch.dtype, r_dtype: torch.dtype, beta: float, rho: float
) -> None:
    v, r, z = [draw((3, 70_001), v_dtype)], [draw((3, 70_001), r_dtype)], [draw((3, 70_001), v_dtype)]
    r[0][:, :5] = NAN
    v[0][0, :2] = to_device(NAN, -0.0)
    before = v[0].clone()
    ops.precondition_(v, r, z, weight_of(v[0]), decay=DECAY, eps=EPS, scalars=to_device(beta, rho), backend=backend)
    bits = {4: torch.int32, 8: torch.int64}[v_dtype.itemsize]
    assert torch.equal(v[0].view(bits), before.view(bits))


@every_backend
@every_combination
def test_as_the_reference(backend: str, v_dtype: torch.dtype, r_dtype: torch.dtype) -> None:
    """Numbers that are subnormal, huge, infinite or NaN: zeros, infinities and NaN are where the reference has them."""
    special = to_device(0.0, 6e-8, 1e-20, 1e-30, 1e-40, 6e4, 1e19, 3e38, INF, -INF, NAN)
    r = special.repeat_interleave(len(special)).to(r_dtype)
    v = special.abs().repeat(len(special)).to(v_dtype)
    results = []
    for function in (backends.preconditioner_kernels(backend).precondition_, reference.precondition_):
        u, new_v = torch.empty_like(v), v.clone()
        sums = function([u], [new_v], [r], [], weight_of(v), 0.999, 1e-8, to_device(0.3, 0.8))
        results.append((u, new_v, sums))
    torch.testing.assert_close(results[0], results[1], rtol=2e-6, atol=0, equal_nan=True)


@every_backend
def test_empty_lists(backend: str) -> None:
    empty = torch.zeros(3, 0, device=DEVICE)
    for tensors in ([], [empty]):
        u, sums = ops.precondition_(
            tensors, tensors, tensors, weight_of(empty), decay=DECAY, eps=EPS, backend=backend
        )  # fmt: skip
        assert sums.tolist() == [0, 0, 0] and len(u) == len(tensors)


@every_backend
def test_two_launches(backend: str) -> None:
    v, r, z = ([draw(shape, torch.float32).abs() for shape in resnet50()] for _ in range(3))
    u, weight, scalars = [torch.empty_like(t) for t in v], weight_of(v[0]), to_device(0.3, 0.8)
    kernel = backends.preconditioner_kernels(backend).precondition_
    for without in (z, []):
        found = launches(lambda z=without: kernel(u, v, r, z, weight, DECAY, EPS, scalars))
        assert len(found) == 2, found


@every_backend
def test_the_same_bits_again(backend: str) -> None:
    v, r, z = ([draw(shape, torch.float32).abs() for shape in SHAPES] for _ in range(3))
    results = []
    for _ in range(3):
        u, sums = ops.precondition_(v, r, z, weight_of(v[0]), decay=DECAY, eps=EPS, backend=backend)
        results.append([sums, *u])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_backend
@pytest.mark.parametrize("r_dtype", [torch.bfloat16, torch.float32])
def test_more_than_2_to_the_31_elements(
    backend: str, r_dtype: torch.dtype, need_memory: Callable[[float], None]
) -> None:
    count = 2**31 + 70_001
    need_memory(1.1 * count * (2 * 4 + r_dtype.itemsize))
    v, r = torch.empty(count, device=DEVICE).uniform_(), torch.empty(count, dtype=r_dtype, device=DEVICE).normal_()
    # The two ends, and where 32-bit indices or byte offsets would wrap.
    starts = [0, 2**29 - 512, 2**30 - 512, 2**31 - 512, count - 1024]
    parts = [slice(start, start + 1024) for start in starts]
    weight = weight_of(v)
    expected = [exact(v[part], r[part], weight.item(), DECAY, EPS) for part in parts]
    numerators = [r[part].double() for part in parts]
    (u,), sums = ops.precondition_(
        [v], [r], None, weight, decay=DECAY, eps=EPS, scalars=to_device(0.3, 0.8), backend=backend
    )
    for part, (v_new, p), numerator in zip(parts, expected, numerators, strict=True):
        torch.testing.assert_close(v[part].double(), v_new, rtol=1e-6, atol=0)
        torch.testing.assert_close(u[part].double(), numerator / p, rtol=3e-6, atol=1e-30)
    wanted = sum((a.double() * b.double()).sum().item() for a, b in zip(r.split(2**27), u.split(2**27), strict=True))
    assert sums[2].item() == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize(("v_dtype", "r_dtype"), [COMBINATIONS[0], COMBINATIONS[2], COMBINATIONS[3]], ids=str)
def test_opcheck(v_dtype: torch.dtype, r_dtype: torch.dtype) -> None:
    u, v, z = ([draw((5, 3), v_dtype).abs(), draw((4,), v_dtype).abs()] for _ in range(3))
    r = [draw((5, 3), r_dtype), draw((4,), r_dtype)]
    operator, weight = torch.ops.curveball_fused.precondition_.default, weight_of(v[0])
    torch.library.opcheck(operator, (u, v, r, z, weight, DECAY, EPS, to_device(0.3, 0.8)))
    torch.library.opcheck(operator, (u, v, r, [], weight, DECAY, EPS, None))


@every_backend
@pytest.mark.parametrize("shape", [(64, 3, 7, 7), (129, 40), (40, 129), (3, 5), (7,)], ids=str)
def test_in_bases(backend: str, shape: tuple[int, ...]) -> None:
    """Around the kernels torch rotates, by pieces that may reach beyond their side: a stack of three, and another."""
    r, z = ([draw(s, torch.float32) for s in (shape, shape, (4, 6), shape)] for _ in "rz")
    blocks = [Block.of(fresh_state(t)) for t in r]
    for i, block in enumerate(blocks):
        for side in block.sides:
            side.basis.copy_(torch.linalg.qr(side.basis + 0.1 * (i + 1) * side.basis.roll(1, -1))[0])
    weight = to_device(0.3)[0]

    def run(backend: str, blocks: list[Block], r: list[Tensor], z: list[Tensor]) -> Any:
        v = [block.square_average for block in blocks]
        left, right = ([None if block[i] is None else block[i].basis for block in blocks] for i in (1, 2))
        sides = dict(left=left, right=right)
        return ops.precondition_in_bases(v, r, z, weight, **sides, decay=0.9, eps=1e-3, backend=backend)

    found = run(backend, blocks, r, z)
    expected = run("torch", [block.widened() for block in blocks], [t.double() for t in r], [t.double() for t in z])
    for ours, exactly in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exactly, rtol=1e-3, atol=1e-3, check_dtype=False)


def test_refreshes_of_a_stack() -> None:
    """By Cholesky decompositions, as by QR on a CPU."""
    states = [fresh_state(draw((48, 300), torch.float32)) for _ in range(12)]
    alone = []
    for state in states:
        for side in ("left", "right"):
            m = draw(state[f"{side}_basis"].shape, torch.float32)
            state[f"{side}_factor"].copy_(m @ m.mT)
            alone.append(refreshed(state[f"{side}_factor"].cpu(), state[f"{side}_basis"].cpu()).to(DEVICE))
    refresh(states, 0, to_device(0.3, 0.8))
    together = [state[f"{side}_basis"] for state in states for side in ("left", "right")]
    for q, expected in zip(together, alone, strict=True):
        eye = torch.eye(q.shape[-1], device=DEVICE).expand_as(q)
        torch.testing.assert_close(q.mT @ q, eye, rtol=0, atol=1e-5)
        torch.testing.assert_close(q * (q * expected).sum(-2, keepdim=True).sign(), expected, rtol=0, atol=1e-3)
