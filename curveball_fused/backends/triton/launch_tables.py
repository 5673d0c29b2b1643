"""Lists of tensors as the Triton kernels see them: tables of addresses on the device.

One launch serves all tensors of the same dtypes, one program per chunk of a tensor. Each program writes its sums to a
slot of its own. Slots are numbered in the order of the lists, so that sums in that order have the same bits anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

CHUNK = 16384  # elements of one program
FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
T = TypeVar("T")


class Item(NamedTuple):
    """One index of the lists: the tensors that stand there, one of each operand."""

    addresses: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    numel: int
    group: int


class Launch(NamedTuple):
    """The tensors of one combination of dtypes.

    `table` holds int64 rows of `tensors` elements: the addresses of each operand, then numel, group, first program and
    first slot; after them, for each of `programs`, the tensor that it works on.
    """

    dtypes: tuple[torch.dtype, ...]
    tensors: int
    programs: int
    table: Tensor


class Plan(NamedTuple):
    """All launches, the number of slots, and where each group's slots are: bounds[g] to bounds[g + 1], int64."""

    launches: tuple[Launch, ...]
    slots: int
    bounds: Tensor


# Sources of copies that CUDA graphs have captured, 8 bytes a number: a replay reads them again, and nothing tells when
# the graph is gone, so that they are kept as long as the process lives.
_captured: list[Tensor] = []


def _cached_per_stream(build: Callable[..., T]) -> Callable[..., T]:
    """Cache the last results of `build(device, ...)` by stream: only there are the copies known to be complete."""

    @lru_cache(maxsize=32)
    def cached(stream: int, *arguments: Any) -> T:
        return build(*arguments)

    @wraps(build)
    def call(device: torch.device, *arguments: Any) -> T:
        if device.type == "cpu":
            return cached(0, device, *arguments)
        # A graph takes nothing from the cache, which might drop it before the graph is replayed, and puts nothing
        # there, as captured copies have not run yet.
        if torch.cuda.is_current_stream_capturing():
            return build(device, *arguments)
        return cached(torch.cuda.current_stream(device).cuda_stream, device, *arguments)

    return call


def _upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy `host` to `device`, without waiting for the copy."""
    if device.type == "cpu":
        return host
    # The allocator of pinned memory does not reuse the source before the copy has run.
    pinned = host.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


@_cached_per_stream
def device_constants(device: torch.device, *values: float) -> Tensor:
    """Return a float64 vector of `values` on `device`."""
    return _upload(torch.tensor(values, dtype=torch.float64), device)


def list_items(
    device: torch.device, operands: Sequence[Sequence[Tensor]], group_sizes: Sequence[int]
) -> tuple[Item, ...]:
    """Read the lists `operands` index by index.

    Args:
        device: where all tensors lie.
        operands: lists of tensors, all of one length.
        group_sizes: how many indices belong to each group.

    Returns:
        An item for each index.

    Raises:
        RuntimeError: a tensor is on another device, where its address would mean something else, or not of floating
            point; the table hides both from Triton.
    """
    for t in chain(*operands):
        if t.device != device:
            raise RuntimeError(f"a tensor is on {t.device}, others on {device}: move all tensors to one device.")
        if t.dtype not in FLOATS:
            raise RuntimeError(f"a tensor has dtype {t.dtype}: convert it to float16, bfloat16, float32 or float64.")
    groups = (group for group, size in enumerate(group_sizes) for _ in range(size))
    return tuple(
        Item(tuple(t.data_ptr() for t in tensors), tuple(t.dtype for t in tensors), tensors[0].numel(), group)
        for *tensors, group in zip(*operands, groups, strict=True)
    )


@_cached_per_stream
def plan(device: torch.device, items: tuple[Item, ...], groups: int) -> Plan:
    """Return tables for `items`, which belong to groups in ascending order, moved to `device` by one copy."""
    slots, ends = 0, [0] * groups
    parts: dict[tuple[torch.dtype, ...], list[tuple[Item, int]]] = {}
    for item in items:
        if item.numel:
            parts.setdefault(item.dtypes, []).append((item, slots))
            slots += -(-item.numel // CHUNK)
        ends[item.group] = slots
    bounds = [0]
    for end in ends:
        bounds.append(max(bounds[-1], end))  # a group without tensors ends where it begins
    tables = [torch.tensor(bounds)]
    sizes = []
    for dtypes, part in parts.items():
        numel = torch.tensor([item.numel for item, _ in part])
        programs = (numel + CHUNK - 1) // CHUNK
        rows = [
            torch.tensor([item.addresses for item, _ in part]).t().flatten(),
            numel,
            torch.tensor([item.group for item, _ in part]),
            programs.cumsum(0) - programs,
            torch.tensor([slot for _, slot in part]),
            torch.repeat_interleave(torch.arange(len(part)), programs),
        ]
        tables.append(torch.cat(rows))
        sizes.append((dtypes, len(part), int(programs.sum())))
    moved = _upload(torch.cat(tables), device).split([len(table) for table in tables])
    launches = (Launch(*size, table) for size, table in zip(sizes, moved[1:], strict=True))
    return Plan(tuple(launches), slots, moved[0])
