"""Call every native operator of the CPU library, on one thread, and on several from two Python threads at once.

tools/sanitize.py runs this with a sanitized library; the argument is how many threads torch has. Sizes are odd, zero,
one and more than a block; lists are long; tensors begin beside aligned addresses, and are transposed where they may be.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from curveball_fused import backends, ops
from curveball_fused.backends import native
from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.ops import losses, tangents

SIZES = ((0,), (1,), (37,), (0, 5), (4, 129), (32_768,), (32_769,), (3, 25_001))
MANY = ((3,), (2,)) * 2500
SIDES = ((1, 1), (5, 1), (37, 129), (130, 70), (0, 3), (7,))
LOGITS = ((0, 3), (1, 1), (300, 10), (7, 1000), (3, 33_001))
HEADS = ((1, 1, 1, 1, 1, 1), (2, 3, 37, 53, 5, 9), (1, 2, 130, 1, 17, 16), (2, 1, 70, 200, 33, 31))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Seen(TorchDispatchMode):
    """Notes the names of our operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "curveball_fused":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def draw(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Random numbers, which begin one element past an aligned address."""
    count = torch.Size(shape).numel()
    return torch.randn(count + 1).to(dtype)[1:].view(shape)


def transposed(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Random numbers with the last two dimensions exchanged in memory."""
    return draw([*shape[:-2], shape[-1], shape[-2]], dtype).transpose(-1, -2) if len(shape) > 1 else draw(shape, dtype)


def lists(dtype: torch.dtype, sizes: Sequence[Sequence[int]] = SIZES) -> None:
    """All operators on lists of parameters, and on the numbers of a step."""
    state = compute_dtype(dtype)
    scalars = torch.rand(len(backends.scalars.SCALARS), dtype=torch.float64)
    number = torch.tensor(0.5, dtype=torch.float64)
    for layout in (draw, transposed):
        w, r = ([layout(shape, dtype) for shape in sizes] for _ in range(2))
        z, v = ([layout(shape, state) for shape in sizes] for _ in range(2))
        sums = ops.dots(z, r)
        ops.precondition_([t.square() for t in v], r, z, number, decay=0.9, eps=1e-8, scalars=scalars)
        ops.precondition_([t.square() for t in v], r, None, number, decay=0.9, eps=1e-8)
        groups = dict(group_sizes=[5, 0, len(w) - 5], weight_decay=[0.1, 0.0, 0.2])
        ops.update_groups_(w, z, r, scalars, lr=[1.0, number, 0.3], **groups)
        ops.update_groups_(w, z, r, scalars * torch.nan, lr=[1.0, 0.2, 0.3], **groups)
    products = torch.randn(5, dtype=torch.float64)
    ops.solve(scalars, number, products)
    solved = ops.solve(scalars, number, products, sums, lr=number, theta=0.5, average=0.9, bounded=True)
    rule = dict(low=0.4, high=1.6, factor=0.9, minimum=0.01, maximum=10.0)
    ops.adapt_damping(solved, number, **rule)
    ops.keep_coefficients(solved, number, sums[2], number, sign=-1.0)


def square(side: int, pieces: int, dtype: torch.dtype) -> Tensor:
    """A basis or factor of a side, whole or in pieces, zero where the last piece reaches beyond it."""
    if pieces == 1:
        return draw((side, side), dtype)
    size = -(-side // pieces)
    whole = torch.block_diag(*draw((pieces, size, size), dtype))
    whole[side:], whole[:, side:] = 0, 0
    return torch.stack([whole[i : i + size, i : i + size] for i in range(0, pieces * size, size)])


def bases(dtype: torch.dtype) -> None:
    """The operators of the Kronecker metric, with each choice of sides."""
    scalars = torch.rand(len(backends.scalars.SCALARS), dtype=torch.float64)
    weight = torch.tensor(0.5, dtype=torch.float64)
    for sides in range(4):
        for pieces in (1, 3):
            v, r, z = ([draw(shape, dtype) for shape in SIDES] for _ in range(3))
            v = [t.square() for t in v]
            matrices = [len(shape) == 2 and min(shape) >= pieces for shape in SIDES]
            left = [
                square(s[0], pieces, dtype) if m and sides & 1 else None for s, m in zip(SIDES, matrices, strict=True)
            ]
            right = [
                square(s[1], pieces, dtype) if m and sides & 2 else None for s, m in zip(SIDES, matrices, strict=True)
            ]
            both = dict(left=left, right=right, decay=0.9)
            _, turned, _ = ops.precondition_in_bases(v, r, z, weight, eps=1e-8, **both)
            ops.precondition_in_bases(v, r, None, weight, eps=1e-8, **both)
            for gather in (False, True):
                ops.update_statistics_(v, turned, r, scalars, weight, gather=gather, **both)


def loss_functions(dtype: torch.dtype) -> None:
    """Cross-entropy, squared error and binary cross-entropy, with and without their weights."""
    for shape in LOGITS:
        x, v, u = (draw(shape, dtype) for _ in range(3))
        target, weight = torch.randint(shape[1], shape[:1]), draw(shape[1:], compute_dtype(dtype)).abs()
        for w in (None, weight):
            options = dict(ignore_index=0, label_smoothing=0.1)
            _, _, products, stats = losses.cross_entropy_cotangent(x, v, target, w, **options)
            losses.cross_entropy_products(x, v, u, target, stats, products, w, **options)
            _, _, products = losses.bce_cotangent(x, v, u.sigmoid(), w, w)
            losses.bce_products(x, v, u, u.sigmoid(), products, w, w)
        _, _, products = losses.mse_cotangent(x, v, u)
        losses.mse_products(x, v, u, u, products)


def tangent_functions(dtype: torch.dtype) -> None:
    """Norms, attention and activations."""
    for shape in ((1, 1), (37, 131), (0, 3), (3, 33_001)):
        for optional in (True, False):
            mean, rstd = draw(shape[:1], dtype), draw(shape[:1], dtype)
            vectors = [draw(shape[1:], dtype) if optional else None for _ in range(3)]
            x, dx = draw(shape, dtype), draw(shape, dtype)
            tangents.layer_norm_tangent(dx, x, mean if optional else None, rstd, *vectors)
    for shape in ((2, 3), (1, 1, 1, 1), (4, 19, 33, 31), (0, 3, 2)):
        for last in (False, True):
            for training in (False, True):
                x, dx = (draw((shape[0], *shape[2:], shape[1]), dtype).movedim(-1, 1) for _ in range(2))
                if not last:
                    x, dx = x.contiguous(), dx.contiguous()
                vectors = [draw(shape[1:2], dtype) for _ in range(5)]
                tangents.batch_norm_tangent(dx, x, *vectors, training=training)
    for b, h, t, s, d, e in HEADS:
        for is_causal in (False, True):
            dq, q = (draw((b, t, h, d), dtype).transpose(1, 2) for _ in range(2))
            dk, k = (draw((b, s, h, d), dtype).transpose(1, 2) for _ in range(2))
            dv, v = (draw((b, h, s, e), dtype) for _ in range(2))
            out = draw((b, h, t, e), dtype)
            for mask in (None, draw((1, 1, t, s), dtype).expand(b, h, t, s), transposed((b, h, t, s), dtype)):
                tangents.attention_tangent(dq, dk, dv, q, k, v, out, mask, is_causal=is_causal, scale=0.3)
    for name in tangents.ACTIVATIONS:
        for shape in ((0,), (1,), (37,), (33_001, 3)):
            tangents.activation(transposed(shape, dtype), name)


def everything() -> None:
    """All of it, in each dtype; tangents have kernels for two."""
    for dtype in DTYPES:
        lists(dtype)
        loss_functions(dtype)
        if dtype == compute_dtype(dtype):
            bases(dtype)
            tangent_functions(dtype)


def main() -> None:
    assert native.CPU.module is not None, native.CPU.why_not
    with Seen() as seen:
        everything()
        lists(torch.float32, MANY)
    assert seen.names == set(native.OPERATORS), set(native.OPERATORS) ^ seen.names
    torch.set_num_threads(int(sys.argv[1]))
    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(everything) for _ in range(2)]:
            each.result()
    instructions = native.CPU.module.INSTRUCTION_SET
    print(f"{len(seen.names)} operators on the loops for {instructions}: nothing found")


if __name__ == "__main__":
    main()
