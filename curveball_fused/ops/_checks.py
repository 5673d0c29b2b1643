"""Checks of the operators' arguments: ValueErrors that say what does not fit, and what would."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curveball_fused.backends.scalars import SCALARS


def check_scalars(scalars: Tensor) -> None:
    """Check that these are the numbers of a step: a kernel may read all of them without looking."""
    if scalars.dtype != torch.float64 or scalars.shape != (len(SCALARS),):
        raise ValueError(
            f"scalars must be float64[{len(SCALARS)}], the values named by backends.scalars.SCALARS; it is "
            f"{scalars.dtype}{list(scalars.shape)}."
        )


def check_like(x: Tensor, **others: Tensor) -> None:
    """Check that tensors, given by their names, have the shape, dtype and device of `x`."""
    for name, t in others.items():
        if t.shape != x.shape or t.dtype != x.dtype or t.device != x.device:
            raise ValueError(
                f"{name} is {t.dtype}{list(t.shape)} on {t.device}, x is {x.dtype}{list(x.shape)} on {x.device}: they "
                "must agree."
            )


def check_contiguous(**tensors: Tensor) -> None:
    """Check that tensors, given by their names, are contiguous."""
    for name, t in tensors.items():
        if not t.is_contiguous():
            raise ValueError(f"{name} is not contiguous: call .contiguous() on it first.")


def check_strides(x: Tensor, **others: Tensor) -> None:
    """Check that tensors of the shape of `x` lie in memory as it does."""
    for name, t in others.items():
        if any(n > 1 and a != b for n, a, b in zip(x.shape, x.stride(), t.stride(), strict=True)):
            raise ValueError(f"{name} is laid out differently in memory from x: copy it into a torch.empty_like(x).")


def check_classes(x: Tensor, target: Tensor, weight: Tensor | None) -> None:
    """Check that `x` is a matrix of logits, `target` a class for each row, and `weight` one number for each class."""
    if x.dim() != 2:
        raise ValueError(f"x must be [rows, classes]; it has shape {list(x.shape)}.")
    if target.dtype != torch.int64 or target.shape != x.shape[:1] or target.device != x.device:
        raise ValueError(
            f"target must be int64[{x.shape[0]}] on {x.device}, a class for each row of x; it is "
            f"{target.dtype}{list(target.shape)} on {target.device}."
        )
    if weight is not None and (weight.shape != x.shape[1:] or weight.device != x.device):
        raise ValueError(
            f"weight must have one element for each of the {x.shape[1]} classes, on {x.device}; it has shape "
            f"{list(weight.shape)} on {weight.device}."
        )
    check_contiguous(target=target)


def check_shape(q: Tensor, name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    """Check that a tensor of an attention has a shape, and the dtype and device of `q`."""
    if t.shape != shape or t.dtype != q.dtype or t.device != q.device:
        wanted = f"{q.dtype}{list(shape)} on {q.device}"
        raise ValueError(f"{name} must be {wanted}, to fit q, k and v; it is {t.dtype}{list(t.shape)} on {t.device}.")


def check_vectors(x: Tensor, dtype: torch.dtype, size: int, **vectors: Tensor | None) -> None:
    """Check that vectors, given by their names, are of a dtype and size, contiguous and where `x` is; or None."""
    for name, t in vectors.items():
        if t is None or (t.shape == (size,) and t.dtype == dtype and t.device == x.device and t.is_contiguous()):
            continue
        wanted = f"{dtype}[{size}] on {x.device}, contiguous"
        raise ValueError(f"{name} must be {wanted}; it is {t.dtype}{list(t.shape)} on {t.device}.")


def check_lists(first: Sequence[Tensor], *others: Sequence[Tensor]) -> None:
    """Check that lists of tensors have the same lengths and shapes, and hold floating-point numbers."""
    for each in (first, *others):
        for i, t in enumerate(each):
            if not t.is_floating_point():
                raise ValueError(f"tensor {i} of a list is {t.dtype}: it must have a floating-point dtype.")
    shapes = [t.shape for t in first]
    for other in others:
        if [t.shape for t in other] == shapes:
            continue
        if len(other) != len(first):
            raise ValueError(f"the lists must have the same length; got {len(first)} and {len(other)} tensors.")
        i = next(i for i, t in enumerate(other) if t.shape != shapes[i])
        raise ValueError(f"tensor {i} has shape {tuple(shapes[i])} in one list and {tuple(other[i].shape)} in another.")


def check_diagonal(decay: float, eps: float, weight: Tensor) -> None:
    """Check the numbers of a pass with Adam's diagonal."""
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be at least 0 and less than 1; got {decay}.")
    single = torch.finfo(torch.float32)
    if not single.tiny <= eps <= single.max:
        raise ValueError(f"eps must be a positive number that float32 has, {single.tiny} or more; got {eps}.")
    if weight.dtype != torch.float64 or weight.dim() != 0:
        raise ValueError(f"weight must be 0-dim float64; it is {weight.dtype}{list(weight.shape)}.")
