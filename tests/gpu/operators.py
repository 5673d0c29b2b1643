"""One call of every operator on small inputs. As a program, it makes them with every backend, for a memory checker."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from curveball_fused import ops
from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.ops import losses as loss_ops
from tests.gpu.device import BACKENDS, DEVICE, DTYPES, draw, to_device

SIZES = ((0,), (1,), (37,), (4, 129), (65_537,), (3, 70_001))
# Rows and classes: a thread for each row, a warp for each, a block for each, and more rows than blocks that each begin
# elsewhere in a 16-byte word.
LOGITS = ((300, 10), (7, 1000), (5, 3001), (4500, 1027))
RULE = dict(low=0.4, high=1.6, factor=0.9, minimum=0.01, maximum=10.0)


@dataclass(frozen=True)
class Inputs:
    """Arguments of all operators, on the device; `run` changes none of them."""

    w: list[Tensor]
    z: list[Tensor]
    r: list[Tensor]
    scalars: Tensor
    products: Tensor
    loss: Tensor
    rates: list[Tensor]
    weight: list[Tensor]
    logits: list[tuple[Tensor, Tensor, Tensor]]
    classes: list[Tensor]

    def tensors(self) -> list[Tensor]:
        """All of them."""
        triples = [t for triple in self.logits for t in triple]
        lists = self.w + self.z + self.r + self.rates + self.weight + triples + self.classes
        return [*lists, self.scalars, self.products, self.loss]


def make(dtype: torch.dtype, sizes: tuple[tuple[int, ...], ...] = SIZES) -> Inputs:
    """Random inputs whose floating-point lists have dtype `dtype`; some tensors are not aligned to 16 bytes."""
    arithmetic = compute_dtype(dtype)
    # β and ρ are solved for; λ, z·z, and the loss of the last step.
    scalars = to_device(0.1, 0.2, 0.3, 1.7, 0.4, 0.5, -1.0, 0.7, 3.0, 4.0, 2.0, 0.6, 0.05, 0.1, 3.0, 0.0)
    return Inputs(
        w=[_misaligned(draw(size, dtype)) for size in sizes],
        z=[draw(size, arithmetic) for size in sizes],
        r=[draw(size, dtype) for size in sizes],
        scalars=scalars,
        products=to_device(-0.5, 1.5, 0.7, 0.3, 2.0),
        loss=to_device(1.25)[0],
        rates=[to_device(0.7)[0], to_device(0.4)[0]],
        weight=[draw((shape[1],), arithmetic).abs() for shape in LOGITS],
        logits=[(draw(shape, dtype), draw(shape, dtype), draw(shape, dtype)) for shape in LOGITS],
        classes=[torch.randint(shape[1], shape[:1], device=DEVICE) for shape in LOGITS],
    )


def run(inputs: Inputs, backend: str) -> list[Tensor]:
    """Everything that the operators make of `inputs`."""
    w, z = [t.clone() for t in inputs.w], [t.clone() for t in inputs.z]
    sums = ops.dots(z, inputs.r, backend=backend)
    v = [t.square() for t in z]
    metric = dict(decay=0.99, eps=1e-8, scalars=inputs.scalars, backend=backend)
    u, metric_sums = ops.precondition_(v, inputs.r, z, inputs.loss, **metric)
    solved = ops.solve(
        inputs.scalars, inputs.loss, inputs.products, sums,
        lr=inputs.rates[0], theta=0.5, average=0.9, bounded=True, backend=backend,
    )  # fmt: skip
    half = len(w) // 2
    updated = ops.update_groups_(
        w, z, inputs.r, solved, group_sizes=[half, len(w) - half], lr=inputs.rates, weight_decay=[0.05, 0.2],
        backend=backend,
    )  # fmt: skip
    adapted = ops.adapt_damping(updated, inputs.loss * 0.5, **RULE, backend=backend)
    kept = ops.keep_coefficients(adapted, inputs.loss, sums[2], inputs.loss, sign=-1.0, backend=backend)
    results = [*w, *z, sums, *u, *v, metric_sums, solved, updated, adapted, kept]
    for (x, v, u), y, weight in zip(inputs.logits, inputs.classes, inputs.weight, strict=True):
        entropy = dict(ignore_index=3, label_smoothing=0.1, backend=backend)
        first = loss_ops.cross_entropy_cotangent(x, v, y, weight, **entropy)
        results += first
        results.append(loss_ops.cross_entropy_products(x, v, u, y, first[3], first[2], weight, **entropy))
        square = loss_ops.mse_cotangent(x, v, u, backend=backend)
        results += [*square, loss_ops.mse_products(x, v, u, u, square[2], backend=backend)]
        target = u.sigmoid()
        binary = loss_ops.bce_cotangent(x, v, target, weight, weight, backend=backend)
        results += [*binary, loss_ops.bce_products(x, v, u, target, binary[2], weight, weight, backend=backend)]
    return results


def _misaligned(t: Tensor) -> Tensor:
    """The same numbers, one element past an aligned address."""
    return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)


def main() -> None:
    # Each tensor by itself, so that an access beside it is seen. torch reads this at the first allocation.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    for dtype in DTYPES:
        inputs = make(dtype)
        for backend in BACKENDS:
            run(inputs, backend)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
