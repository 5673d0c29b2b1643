"""Replicas of one model in several processes: sums over them, and the look whether they are still equal.

Each process takes the same step from the same numbers: what is summed over the processes is Jᵀc, in buckets that are on
their way while the backward pass still runs (as Li et al. 2020 do, "PyTorch distributed: experiences on accelerating
data parallel training"), and the handful of numbers that the 2x2 system is made of. All else follows in each of them,
bit for bit, as a collective gives all of them the same bits.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Self

from curveball_fused._torch_private import DisableTorchFunction, is_in_join
from curveball_fused.user_warnings import warn_user

BUCKET_BYTES = 25 * 2**20  # of DistributedDataParallel
_ENDED = (
    "a process of the group has ended, failed, or takes fewer steps than this one: every process must take every step. "
    "Give all of them the same number of batches (DistributedSampler, drop_last=True), or let one that has run out go "
    "on with any batch at the weight zero: optimizer.step([(model_fn, loss_fn)], weights=[0.0])"
)


# gloo's threads let go of a tensor a little after the collective is over. Where theirs is the last reference they need
# the interpreter for it, and abort a process that is about to end: so there is one here, which outlives them.
_last_sent: list[Tensor] = []


class CopiedGroup:
    """A process group in a copy of an optimizer, which is the same group; pickling it is refused.

    Args:
        group: of torch.distributed.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an optimizer with process_group= cannot be pickled, as the group belongs to this process: save "
            "optimizer.state_dict(), and load it into a CurveBall that is constructed with the group."
        )


class LostProcess(RuntimeError):
    """Another process of the group has not taken part in what all of them must do."""


class Processes:
    """The processes that train replicas of one model, each on its own part of every batch.

    Args:
        group: of torch.distributed.
        wrappers: the DistributedDataParallel that the model is in, or those of its parts; perhaps none.

    Attributes:
        sent_bytes: what this process has given to collectives since it was last set to zero.
        may_overlap: whether each parameter's gradient comes once in a backward pass, and as it is returned at the end;
            None before the first one has been watched.
    """

    def __init__(self, group: dist.ProcessGroup, wrappers: Sequence[DistributedDataParallel] = ()) -> None:
        self._group = group
        self._wrappers = wrappers
        self._modules: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()  # the outermost ones
        self._buckets: list[_Bucket] = []
        self.may_overlap: bool | None = None
        self.sent_bytes = 0

    def sum(self, numbers: Tensor) -> Tensor:
        """Return the sum of each process's tensor."""
        total = numbers.clone()
        self.wait(self.all_reduce(total))
        return total

    def all_reduce(self, t: Tensor) -> dist.Work | None:
        """Begin to sum over the processes, in place."""
        self._note_sent(t)
        with _explained():
            work: dist.Work | None = dist.all_reduce(t, group=self._group, async_op=True)
        return work

    def _note_sent(self, t: Tensor) -> None:
        """Count what a collective is given, and keep it until the next one."""
        _last_sent[:] = [t]
        self.sent_bytes += t.nbytes

    def wait(self, work: dist.Work | None) -> None:
        """Wait for a collective, in the manner of the device."""
        with _explained():
            if work is not None:
                work.wait()

    def buckets(self, params: Sequence[Tensor]) -> list[_Bucket]:
        """Return flat memory for gradients of these parameters, the last ones first, as a backward pass comes.

        It is that of the step before, so that a gradient must be used before the next step. Its dtypes are theirs,
        however many parts a process has, since all must send the same.
        """
        layout = [(p.shape, p.stride(), p.dtype, p.device) for p in params]
        if [entry for bucket in reversed(self._buckets) for entry in reversed(bucket.layout)] != layout:
            self._buckets = _new_buckets(layout)
            self.may_overlap = None
        return self._buckets

    def forget_buckets(self) -> None:
        """Let the next step have other memory, as a sum that nobody waits for may still write to this."""
        self._buckets = []

    def note_modules(self, modules: Sequence[nn.Module]) -> None:
        """Note which modules were called, and so what is inside of them; the buffers are those of the first process.

        What a process has called inside of a model may depend on its batch, and what it has not called yet counts too.
        """
        known = {module for outermost in self._modules for module in outermost.modules()}
        for module in modules:
            if module not in known:
                self._modules[module] = None
                known.update(module.modules())

    def modules(self) -> list[nn.Module]:
        """Return the outermost modules that were noted."""
        return list(self._modules)

    def broadcast_buffers(self) -> None:
        """Let all processes have the buffers of the first, as DistributedDataParallel does before its next run."""
        by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for buffer in self._shared_buffers():
            by_kind.setdefault((buffer.dtype, buffer.device), []).append(buffer)
        for buffers in by_kind.values():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            self._note_sent(flat)
            with _explained():
                dist.broadcast(flat, group=self._group, group_src=0)
            for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(part.view_as(buffer))

    def _shared_buffers(self) -> list[Tensor]:
        """Return them in the same order in every process."""
        if self._wrappers:
            found = [
                buffer
                for wrapper in self._wrappers
                if wrapper.broadcast_buffers
                for name, buffer in wrapper.module.named_buffers()
                if name not in wrapper.parameters_to_ignore
            ]
        else:
            found = [buffer for module in self._modules for buffer in module.buffers()]
        return list({id(b): b for b in found}.values())

    def check_equal(self, tensors: Sequence[Tensor]) -> None:
        """Raise RuntimeError unless the tensors of all processes are equal, bit for bit; this waits for the device."""
        own = torch.stack([torch.tensor(len(tensors)), *(_checksum(t).cpu() for t in tensors)]).sum()
        device = tensors[0].device if tensors else torch.device("cpu")
        extremes = torch.stack((own, -own)).to(device)
        self._note_sent(extremes)
        with _explained():
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self._group)
        if int(extremes.sum()):
            raise RuntimeError(
                "the processes have different parameters, or a different state of the optimizer: each would go on from "
                "another point, and nothing has been changed. Wrap the model in DistributedDataParallel, or give all "
                "the same seed before it is made (torch.manual_seed), and load a checkpoint in every process."
            )

    @contextmanager
    def wrappers_set_aside(self) -> Iterator[None]:
        """Let a call of the wrapped model be a call of the model: what it adds, `sum` and the others do."""
        for wrapper in self._wrappers:
            _check_wrapper(wrapper)
        for wrapper in self._wrappers:
            vars(wrapper)["forward"] = wrapper.module.__call__
        try:
            yield
        finally:
            for wrapper in self._wrappers:
                del vars(wrapper)["forward"]


class _Bucket(NamedTuple):
    """Gradients that are summed in one collective.

    Attributes:
        flat: their memory.
        views: of it, of the gradients' shapes.
        layout: what they look like.
    """

    flat: Tensor
    views: list[Tensor]
    layout: list[tuple[Any, ...]]


class GradientSum:
    """The sum over the processes of share · Jᵀc + addend, begun while the backward pass that computes Jᵀc runs.

    Args:
        processes: over which the sum runs.
        params: the parameters, which are leaves.
        share: the factor of this process's own gradient, a number or 0-dim.
        addends: of the parameters' shapes, or none.
    """

    def __init__(
        self,
        processes: Processes,
        params: Sequence[Tensor],
        share: float | Tensor,
        addends: Sequence[Tensor] | None,
    ) -> None:
        self._processes, self._params, self._share, self._addends = processes, params, share, addends
        self._buckets = processes.buckets(params)
        self._place = [(b, i) for b, bucket in enumerate(self._buckets) for i in range(len(bucket.views))]
        self._place.reverse()  # of each parameter: which bucket, which view
        self._missing = [len(bucket.views) for bucket in self._buckets]
        self._work: list[dist.Work | None] = []
        self._arrived: dict[int, int] = {}  # at which address
        self._came_twice = False
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._hooks = [p.register_hook(partial(self._arrive, i)) for i, p in enumerate(self._params) if p.is_leaf]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is not None:
            self._processes.forget_buckets()

    def of(self, r: Sequence[Tensor]) -> list[Tensor]:
        """Return the sum, of what the backward pass has returned."""
        as_seen = not self._came_twice and all(
            self._arrived.get(i, r_i.data_ptr()) == r_i.data_ptr() for i, r_i in enumerate(r)
        )
        if self._processes.may_overlap and not as_seen:
            self._processes.forget_buckets()
            raise RuntimeError(
                "the model's backward pass runs another one inside, through the same parameters, which it did not do "
                "in the first step: what has been sent to the other processes is not the gradient."
            )
        for i, r_i in enumerate(r):
            if i not in self._arrived or not self._processes.may_overlap:
                self._put(i, r_i)
        if self._processes.may_overlap is None:
            self._processes.may_overlap = as_seen
        for work in self._work:
            self._processes.wait(work)
        return [self._buckets[b].views[i] for b, i in self._place]

    def _arrive(self, i: int, gradient: Tensor) -> None:
        """Take the gradient of parameter `i`, which the engine has just summed up."""
        self._came_twice |= i in self._arrived
        self._arrived[i] = gradient.data_ptr()
        if self._processes.may_overlap and not self._came_twice:
            self._put(i, gradient)

    def _put(self, i: int, gradient: Tensor) -> None:
        b, place = self._place[i]
        with DisableTorchFunction(), torch.no_grad():  # a method's modes may be active
            view = self._buckets[b].views[place]
            if self._addends is None:
                view.copy_(gradient).mul_(self._share)
            else:
                addend = self._addends[i]
                view.copy_(gradient.to(addend.dtype) * self._share + addend)
            self._missing[b] -= 1
            # In one order in all processes: that of the buckets.
            while len(self._work) < len(self._buckets) and not self._missing[len(self._work)]:
                self._work.append(self._processes.all_reduce(self._buckets[len(self._work)].flat))


def _new_buckets(layout: Sequence[tuple[Any, ...]]) -> list[_Bucket]:
    grouped: list[list[tuple[Any, ...]]] = []
    room = 0
    for entry in reversed(layout):
        shape, _, dtype, _ = entry
        size = math.prod(shape) * dtype.itemsize
        if not grouped or size > room or grouped[-1][0][2] != dtype:
            grouped.append([])
            room = BUCKET_BYTES
        grouped[-1].append(entry)
        room -= size
    return [_bucket(entries) for entries in grouped]


def _bucket(entries: list[tuple[Any, ...]]) -> _Bucket:
    _, _, dtype, device = entries[0]
    sizes = [math.prod(shape) for shape, *_ in entries]
    flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
    views = []
    for part, (shape, stride, *_) in zip(flat.split(sizes), entries, strict=True):
        dense = torch.empty_strided(shape, stride, device="meta")
        in_order = torch.empty_like(dense, memory_format=torch.preserve_format).stride() == stride
        views.append(part.as_strided(shape, stride) if in_order else part.view(shape))
    return _Bucket(flat, views, entries)


def _checksum(t: Tensor) -> Tensor:
    """Return a number that tells apart tensors whose bits differ, 0-dim int64."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    bits = t.detach().contiguous().reshape(-1).view(integers).long()
    return (bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum()


@contextmanager
def _explained() -> Iterator[None]:
    """Say what it means when a collective fails."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(f"{_ENDED}. ({error})") from error


def are_there_processes() -> bool:
    """Return whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def processes_of(params: Sequence[Tensor], group: dist.ProcessGroup | None) -> Processes | None:
    """Return the processes that train these parameters; None where this one does alone.

    It warns where there are other processes and nothing says that they train the same model.

    Args:
        params: the optimizer's.
        group: that was given to it.

    Raises:
        RuntimeError: the model's wrapper is used in a way that a step cannot follow.
    """
    if not are_there_processes():
        return None
    place = {id(p): i for i, p in enumerate(params)}
    everywhere = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    of_wrapper = [
        (min((place.get(id(p), len(place)) for p in w.parameters()), default=len(place)), w) for w in everywhere
    ]
    wrappers = [w for i, w in sorted(of_wrapper, key=lambda pair: pair[0]) if i < len(place)]
    for wrapper in wrappers:
        _check_wrapper(wrapper)
    groups = {id(g): g for g in ([group] if group else [w.process_group for w in wrappers])}
    if len(groups) > 1:
        raise RuntimeError(
            "the parameters are in several DistributedDataParallel with different process groups: construct CurveBall "
            "with process_group=, the one over which all are to be averaged."
        )
    if groups:
        return Processes(next(iter(groups.values())), wrappers)
    if (count := dist.get_world_size()) > 1:
        warn_user(
            f"each of {count} processes takes steps of its own, from its own batch: right if each has a model to "
            "itself, but replicas of one model drift apart. For one model wrap it in DistributedDataParallel, or "
            "construct CurveBall with process_group=torch.distributed.group.WORLD."
        )
    return None


def _check_wrapper(wrapper: DistributedDataParallel) -> None:
    if is_in_join(wrapper):
        raise RuntimeError(
            "CurveBall does not take part in join(): give every process the same number of batches, or let one that "
            "has run out go on with any batch at the weight zero, optimizer.step([(model_fn, loss_fn)], weights=[0.0])."
        )
    if wrapper.mixed_precision is not None:
        raise RuntimeError(
            "CurveBall does not follow the mixed precision of DistributedDataParallel: leave mixed_precision out, and "
            "use torch.autocast in model_fn."
        )
