"""What the tests of the emulated kernels for lists share."""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor

from curveball_fused.backends.scalars import BETA, DIRECTION_DAMPING, RHO, Z_DOT_Z
from tests.helpers.emulated import operators

CHUNK = 1024  # elements; CMakeLists.txt sets it, so that tensors of a few thousand are walked as large ones on a GPU


def draw(n: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Random numbers, `offset` elements behind an address that is a multiple of 64 bytes."""
    buffer = torch.randn(offset + n + 9, dtype=torch.float64).to(dtype)
    return buffer[offset : offset + n]


def reserved(n: int, dtype: torch.dtype) -> Tensor:
    """n zeros that take memory only where they are touched."""
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, n * dtype.itemsize, flags=flags), dtype=dtype)


def surroundings(t: Tensor) -> Tensor:
    """What lies before and behind a tensor that `draw` made."""
    buffer = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    return torch.cat((buffer[: t.storage_offset()], buffer[t.storage_offset() + t.numel() :])).clone()


def update_(w: list[Tensor], z: list[Tensor], r: list[Tensor], s: Tensor, groups: Any = None, **options: Any) -> Tensor:
    """All tensors in one group of lr 0.6 and weight decay 0.05, unless `groups` = (sizes, rates, decays) says else."""
    return operators.update_(w, z, r, s, *(groups or ([len(w)], [0.6], [0.05])), options.get("lr_tensor"))


def check_update(w: list[Tensor], z: list[Tensor], r: list[Tensor], s: Tensor, lr: Any, decay: Any, run: Any) -> Tensor:
    """Runs the update and compares it with float64 arithmetic; lr and decay: of each tensor. Returns the scalars."""
    beta, rho, damping = s[BETA].item(), s[RHO].item(), s[DIRECTION_DAMPING].item()
    old = [(w_i.double().clone(), z_i.double().clone(), r_i.double()) for w_i, z_i, r_i in zip(w, z, r)]
    around = [surroundings(t) for t in w + z]
    result = run()
    for w_i, z_i, (w_old, z_old, r_old), lr_i, decay_i in zip(w, z, old, lr, decay):
        z_new = (rho - beta * damping) * z_old - beta * r_old
        w_new = (1 - lr_i * decay_i) * w_old + lr_i * z_new
        epsilon = 2 * torch.finfo(z_i.dtype).eps * (w_old.abs() + z_old.abs() + r_old.abs())
        assert ((z_i.double() - z_new).abs() <= epsilon).all()
        # One rounding to the parameter's dtype, on top of the arithmetic in the state's.
        rounding = torch.finfo(w_i.dtype).eps * w_new.abs() / 2 if w_i.dtype != z_i.dtype else 0
        assert ((w_i.double() - w_new).abs() <= 2 * epsilon + rounding + torch.finfo(w_i.dtype).tiny).all()
    assert all(torch.equal(before, surroundings(t)) for before, t in zip(around, w + z))
    zz = sum((z_i.double().square().sum() for z_i in z), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(result[Z_DOT_Z], zz, rtol=1e-12, atol=0)
    return result
