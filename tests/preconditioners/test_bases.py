"""The bases of the Kronecker factors stay orthogonal, find the eigenvectors, and are refreshed in turns."""

from __future__ import annotations

import pytest
import torch

from curveball_fused.preconditioners.bases import (
    EARLY_STEPS,
    INTERVAL,
    SHIFT,
    cholesky_qr,
    due_after,
    refresh,
    refresh_alike,
    refreshed,
)
from curveball_fused.preconditioners.blocks import NAMES, fresh_state

SCALARS = torch.ones(2, dtype=torch.float64)


def random_factor(n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    m = torch.randn(n, 2 * n, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return (m * torch.logspace(0, -3, 2 * n, dtype=dtype)) @ m.T / n


@pytest.mark.parametrize(
    ("n", "refreshes"),
    [(8, 10_000), (96, 300), *(pytest.param(n, 100_000, marks=pytest.mark.slow) for n in (8, 32))],
)
def test_a_basis_stays_orthogonal(n: int, refreshes: int) -> None:
    """As each is orthogonal anew, its error does not grow with their number: 10,000 are those of 200,000 steps."""
    factor, basis, worst = random_factor(n, torch.float32), torch.eye(n), 0.0
    for i in range(refreshes):
        m = torch.randn(n, 4)
        factor.lerp_(m @ m.T * 10.0 ** (i % 7 - 3), 0.1)
        basis = refreshed(factor, basis)
        if i % 100 == 99:
            worst = max(worst, float((basis.T @ basis - torch.eye(n)).abs().max()))
    assert 0 < worst < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (2, 3, 33, 33)])
def test_cholesky_qr_is_qr_but_for_signs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of the worst that a factor can give: of rank one, with the shift that keeps it positive."""
    m = torch.randn(*shape[:-1], 1, dtype=torch.float64)
    factor = m @ m.mT
    shift = SHIFT * factor.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    basis, _ = torch.linalg.qr(torch.randn(shape, dtype=torch.float64))
    a = (factor @ basis + shift * basis).to(dtype)
    found, (expected, _) = cholesky_qr(a, torch.full_like(a, torch.nan)), torch.linalg.qr(a.double())
    eye = torch.eye(shape[-1], dtype=torch.float64).expand(shape)
    torch.testing.assert_close(found.double().mT @ found.double(), eye, rtol=0, atol=10 * torch.finfo(dtype).eps)
    signs = (found * expected).sum(-2, keepdim=True).sign()
    torch.testing.assert_close(found.double(), expected * signs, rtol=0, atol=max(1e-9, torch.finfo(dtype).eps))


def test_cholesky_qr_keeps_the_basis_where_it_has_no_answer() -> None:
    eye = torch.eye(4).expand(4, 4, 4)
    a = torch.randn(4, 4, 4)
    a[1], a[2, :, 2], a[3, 0, 0] = 0, 0, torch.nan
    assert [torch.equal(found, eye[0]) for found in cholesky_qr(a, eye)] == [False, True, True, True]


def test_a_basis_becomes_that_of_the_eigenvectors() -> None:
    factor, basis = random_factor(12, torch.float64), torch.eye(12, dtype=torch.float64)
    for _ in range(2000):
        basis = refreshed(factor, basis)
    turned = basis.T @ factor @ basis
    assert (turned - torch.diag(turned.diag())).abs().max() < 1e-6 * turned.diag().max()


def test_directions_of_which_a_factor_says_nothing_stay() -> None:
    a = torch.tensor([[1.0, 2.0, 0.0, 0.0]], dtype=torch.float64)
    basis = refreshed(a.T @ a, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(basis[2:, 2:].abs(), torch.eye(2, dtype=torch.float64))
    assert basis[:2, 2:].abs().max() < 1e-12


def test_before_the_first_gradient_nothing_turns() -> None:
    torch.testing.assert_close(refreshed(torch.zeros(5, 5), torch.eye(5)).abs(), torch.eye(5))


@pytest.mark.parametrize("lengths", [[], [3], [64] * 30, [1024, 8, 8, 512, 4, 300, 300, 77], list(range(2, 40))])
def test_each_side_has_its_turn_and_no_step_has_much_more_than_its_share(lengths: list[int]) -> None:
    works = tuple(n**3 for n in lengths)
    for step in range(EARLY_STEPS):
        assert due_after(step, works) == (list(range(len(lengths))) if step in (0, 1, 2, 4, 8) else [])
    turns = [due_after(EARLY_STEPS + step, works) for step in range(INTERVAL)]
    assert sorted(i for turn in turns for i in turn) == list(range(len(lengths)))
    work = [sum(works[i] for i in turn) for turn in turns]
    assert max(work) <= sum(work) / INTERVAL + max(works, default=0)


@pytest.mark.parametrize("beta", [1.0, torch.nan])
def test_a_skipped_step_refreshes_nothing(beta: float) -> None:
    state = fresh_state(torch.zeros(4, 3))
    state["left_factor"].copy_(random_factor(4, torch.float32))
    refresh([state], 0, SCALARS * beta)
    assert torch.equal(state["left_basis"], torch.eye(4)) == (beta != 1.0)


@pytest.mark.parametrize("shape", [(5, 5), (3, 4, 4)])
@pytest.mark.parametrize("taken", [True, False])
def test_bases_of_one_shape_are_refreshed_at_once(shape: tuple[int, ...], taken: bool) -> None:
    sides = []
    for _ in range(4):
        m = torch.randn(shape, dtype=torch.float64)
        sides.append((m @ m.mT, torch.linalg.qr(torch.randn(shape, dtype=torch.float64))[0]))
    expected = [refreshed(factor, basis) if taken else basis.clone() for factor, basis in sides]
    refresh_alike(sides, torch.tensor(taken))
    torch.testing.assert_close([basis for _, basis in sides], expected, rtol=1e-12, atol=1e-12)


def test_on_a_cpu_the_bits_of_a_refresh_do_not_depend_on_the_other_sides() -> None:
    states = [fresh_state(torch.zeros(12, 12)) for _ in range(6)]
    for i, state in enumerate(states):
        for side in ("left", "right"):
            state[f"{side}_factor"].copy_(random_factor(12, torch.float32, i))
    expected = [refreshed(state["left_factor"], state["left_basis"]) for state in states]
    refresh(states, 0, SCALARS)
    assert all(torch.equal(state["left_basis"], q) for state, q in zip(states, expected))


@pytest.mark.parametrize(
    ("shape", "sides"),
    [((), {}), ((7,), {}), ((0, 4), {}), ((1, 5), {"right": 5}), ((5, 1), {"left": 5}),
     ((3, 4), {"left": 3, "right": 4}),
     ((3, 2, 3, 3), {"left": 3, "right": 18}), ((2000, 6), {"right": 6}), ((2000, 2000), {}), ((4, 0, 3), {})],
)  # fmt: skip
def test_which_sides_have_factors(shape: tuple[int, ...], sides: dict[str, int]) -> None:
    state = fresh_state(torch.zeros(shape, dtype=torch.bfloat16))
    assert state.keys() <= set(NAMES)
    assert state.pop("square_average").shape == shape
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        f"{side}_{what}": (n, n) for side, n in sides.items() for what in ("factor", "basis")
    }
    assert all(t.dtype == torch.float32 for t in state.values())
