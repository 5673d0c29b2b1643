"""Put back memory: the values that a run overwrites, and the places and sizes of the tensors that show them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curveball_fused._torch_private import base_of, is_functorch_wrapped, storage_identity, version_of


class Unrepeatable(RuntimeError):
    """The model does what no other run, and so no method of differentiating it, can take part in."""


class Memory:
    """What a run of the model writes to and has not created, as it was before the run and as the run left it.

    The run created what autograd has a graph for, and a memory that first showed up as the result of a call; but not,
    whatever its graph says by now, a memory that was once saved.

    Args:
        params: the optimized parameters. What shares memory with one of them is one of them, whatever it is called.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params = list(params)
        self._params_by_memory: dict[int, list[Tensor]] | None = None  # as they lie in this run, once it is asked for
        self._written_params: dict[int, Tensor] = {}
        self._created: set[int] = set()
        self._external: set[int] = set()
        self._places: set[_Place] = set()
        self._before: dict[int, _Record] = {}  # by the identity of the tensors
        self._after: dict[int, list[_Record]] = {}
        self._touched: set[int] = set()  # memories that the run has written to
        self._watched: dict[int, tuple[Tensor, Tensor]] = {}  # and aliases at their places before the run
        self._versions: list[int] = []

    def begin(self) -> None:
        """Note the versions of the parameters, of which each write makes a new one."""
        self._versions = [*map(version_of, self._params)]

    def watch_buffers(self, buffers: Iterable[Tensor | None]) -> None:
        """Note the places of buffers, as no torch function is called by `buffer.set_`."""
        for buffer in _with_memory(buffers):
            alias = buffer.detach()
            if id(buffer) not in self._watched and not _is_traced(buffer, alias):
                self._watched[id(buffer)] = (buffer, alias)

    def before_write(self, values: Iterable[Any]) -> None:
        """Keep what the tensors among `values` show, which a call may be about to change."""
        for tensor in _with_memory(values):
            if self._is_external(tensor):
                self._touched.add(storage_identity(tensor))
                self._written_params |= {id(p): p for p in self._parameters_in(tensor)}
                self._save(tensor)

    def after_write(self, values: Iterable[Any]) -> None:
        """Let autograd and the tape know of a write to a parameter, which `parameter.data` hides from them."""
        for tensor in _with_memory(values):
            for p in self._parameters_in(tensor):
                torch.autograd.graph.increment_version(p)

    def add_created(self, results: Iterable[Any], arguments: Iterable[Any]) -> None:
        """Note the memory of results; one in that of an argument is a view, created by the run or not as that is."""
        memories = {storage_identity(t) for t in _with_memory(results)}
        if memories:
            self._created |= memories - {storage_identity(t) for t in _with_memory(arguments)}

    def was_written(self, tensor: Tensor, value: Tensor) -> None:
        """Note that a run which could not be watched has written to `tensor`, whose value was `value`."""
        before = _Record.of(tensor, known=True)._replace(value=value)
        self._written_params |= {id(p): p for p in self._parameters_in(tensor)}
        self._before[id(tensor)] = before
        self._after[id(tensor)] = [_Record.of(tensor)]

    def mark(self) -> None:
        """Note what the run has left where it wrote; `RuntimeError` is raised for a write that nobody has seen."""
        versions = [*map(version_of, self._params)]
        for p, now, version in zip(self._params, versions, self._versions, strict=True):
            # Views of one tensor have one version.
            if now != version and id(p) not in self._written_params and not self._is_written_beside(p):
                raise Unrepeatable(
                    f"model_fn writes to a parameter of shape {tuple(p.shape)} by what is no torch function, as "
                    "`parameter.set_` and scripted modules do, so the write cannot be repeated: write to "
                    "`parameter.data` instead."
                )
        self._save_moved_buffers()
        places: set[_Place] = set()
        for key, before in self._before.items():
            memories = {storage_identity(before.alias), storage_identity(before.tensor)}
            if key not in self._after or memories & self._touched:
                # A tensor that has been moved, and its former place, which others may show.
                shown = (
                    [before.alias, before.tensor] if _place(before.tensor) != _place(before.alias) else [before.tensor]
                )
                self._after[key] = [_Record.of(t, known=_place(t) in places) for t in shown]
                places.update(map(_place, shown))
        self._touched.clear()
        self._params_by_memory = None

    def rewind(self) -> None:
        """Put back what was there before the run."""
        self._params_by_memory = None
        self._save_moved_buffers()  # of a run that has failed
        # The last saved first: of two views of one memory, the one that was saved first holds the older values.
        for record in reversed(self._before.values()):
            record.put_back()

    def finish(self) -> None:
        """Put back what the run has left."""
        for records in self._after.values():
            for record in records:
                record.put_back()

    def of_now(self) -> Snapshot:
        """Return what is now where the runs have written so far."""
        return Snapshot([_Record.of(record.tensor) for record in self._before.values()])

    def written_parameters(self) -> Snapshot:
        """Return the parameters that a run has written to, as they are now."""
        return Snapshot([_Record.of(p) for p in self._written_params.values()])

    @property
    def wrote_parameters(self) -> bool:
        """Whether a run has written to parameters."""
        return bool(self._written_params)

    def _parameters_in(self, tensor: Tensor) -> list[Tensor]:
        """Return the parameters of which a tensor may show elements."""
        if self._params_by_memory is None:
            self._params_by_memory = {}
            for p in _with_memory(self._params):
                self._params_by_memory.setdefault(storage_identity(p), []).append(p)
        return [p for p in self._params_by_memory.get(storage_identity(tensor), ()) if _overlap(p, tensor)]

    def _save_moved_buffers(self) -> None:
        for buffer, alias in self._watched.values():
            if storage_identity(buffer) != storage_identity(alias) or buffer.size() != alias.size():
                self._before.setdefault(id(buffer), _Record.of(alias)._replace(tensor=buffer))
        self._watched.clear()

    def _is_written_beside(self, param: Tensor) -> bool:
        """Return whether a tensor over the memory of a parameter has been written to."""
        return any(storage_identity(t) in self._external for t in _with_memory([param]))

    def _is_external(self, tensor: Tensor) -> bool:
        memory = storage_identity(tensor)
        if memory not in self._external:
            base = base_of(tensor)
            root = tensor if base is None else base
            if root.grad_fn is not None or memory in self._created:
                return False
            self._external.add(memory)
        return True

    def _save(self, tensor: Tensor) -> None:
        if id(tensor) not in self._before:
            place = _place(tensor)
            record = _Record.of(tensor, known=place in self._places)
            if not _is_traced(tensor, record.alias):
                self._before[id(tensor)] = record
                self._places.add(place)


class Snapshot(NamedTuple):
    """Tensors at one time."""

    records: Sequence[_Record]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors themselves."""
        return [record.tensor for record in self.records]

    def put_back(self) -> None:
        """Let them be what they were."""
        with torch.no_grad():
            for record in self.records:
                record.put_back()


class _Place(NamedTuple):
    """Which part of which memory a tensor shows, and as what."""

    memory: int
    offset: Any
    size: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype


def _place(tensor: Tensor) -> _Place:
    return _Place(storage_identity(tensor), tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype)


class _Record(NamedTuple):
    """What a tensor showed at one time.

    Attributes:
        tensor: itself, which may have been given another place since.
        alias: another tensor, at the place that it had.
        nbytes: the size of the whole memory.
        value: what was there; None where an earlier record of the same place has it, or the memory had been freed.
    """

    tensor: Tensor
    alias: Tensor
    nbytes: int
    value: Tensor | None

    @staticmethod
    def of(tensor: Tensor, known: bool = False) -> _Record:
        """Return what a tensor shows now; without the value, where that is known."""
        alias = tensor.detach()
        nbytes = alias.untyped_storage().nbytes()
        is_freed = alias.numel() > 0 and nbytes < alias.storage_offset() * alias.element_size() + span(alias)
        return _Record(tensor, alias, nbytes, None if known or is_freed else alias.clone())

    def put_back(self) -> None:
        """Give the tensor its place and the place its value, without gradients."""
        memory = self.alias.untyped_storage()
        if memory.nbytes() != self.nbytes:
            memory.resize_(self.nbytes)
        if _place(self.tensor) != _place(self.alias):
            self.tensor.data = self.alias
        if self.value is not None:
            self.alias.copy_(self.value)


def _is_traced(tensor: Tensor, alias: Tensor) -> bool:
    """Return whether the alias is none, since a graph is traced at this moment, in which nothing is written to."""
    return storage_identity(alias) != storage_identity(tensor)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one memory may show the same elements."""
    first, other = (t.storage_offset() * t.element_size() for t in (a, b))
    length, other_length = span(a), span(b)
    return min(length, other_length) > 0 and first < other + other_length and other < first + length


def span(tensor: Tensor) -> int:
    """Return how many bytes there are from the first element of a tensor to the end of its last one."""
    if tensor.numel() == 0:
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.element_size() * (1 + int(steps))


def _with_memory(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors in nested lists that have memory, which alone can be written to; of a wrapper, what it wraps.

    There is none inside torch.func transforms, on the meta device, and where a graph is traced.
    """
    for value in values:
        if isinstance(value, Tensor):
            if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                names = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
                yield from _with_memory([getattr(value, name) for name in names])
            elif value.layout == torch.strided and not (
                is_functorch_wrapped(value) or value.is_meta or value.is_nested
            ):
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _with_memory(value)
