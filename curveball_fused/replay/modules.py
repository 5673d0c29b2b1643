"""Put back what modules keep from run to run: buffers and plain attributes, where a run gives them other values."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import eq, is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from curveball_fused._torch_private import buffers_of

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}  # parameters, submodules, hooks: not a model's state
_CONTAINERS = frozenset((list, dict, set, deque))
_LARGEST = 256  # entries of a container that is looked at: a larger one is a table, not a state


class Modules:
    """The modules that a run calls, as they were when first called, and as the run left them.

    An attribute is put back by identity: a number, a tensor, whatever was assigned. Of a list, dictionary, set or deque
    the entries are put back too. What is changed inside other objects is not seen.
    """

    def __init__(self) -> None:
        self._before: dict[int, _Snapshot] = {}
        self._after: dict[int, _Snapshot] = {}
        self._called: set[int] = set()  # in this run

    def on_call(self, module: nn.Module) -> Iterable[Tensor | None]:
        """Keep the state of a module that is about to be called; return its buffers, when it is first called."""
        if id(module) in self._called:
            return ()
        self._called.add(id(module))
        if id(module) not in self._before:
            self._before[id(module)] = _Snapshot.of(module)
        return self._before[id(module)].buffers.values()

    def mark(self) -> None:
        """Note what the run has left where it has changed something."""
        for key in self._called:
            known = self._after.get(key) or self._before[key]
            if not known.is_current():
                self._after[key] = _Snapshot.of(known.module)
        self._called.clear()

    def rewind(self) -> None:
        """Put back what was there before the run."""
        for snapshot in self._before.values():
            if not snapshot.is_current():
                snapshot.put_back()

    def finish(self) -> None:
        """Put back what the run has left."""
        for snapshot in self._after.values():
            snapshot.put_back()

    def called(self) -> list[nn.Module]:
        """Return the modules that were called."""
        return [snapshot.module for snapshot in self._before.values()]


class _Snapshot(NamedTuple):
    """What a module held at one time.

    Attributes:
        module: itself.
        buffers: by name; a buffer may be replaced by a new tensor rather than written to.
        attributes: by name.
        contents: copies of the attributes that are small containers, beside what every module has.
    """

    module: nn.Module
    buffers: dict[str, Tensor | None]
    attributes: dict[str, Any]
    contents: dict[str, Any]

    @staticmethod
    def of(module: nn.Module) -> _Snapshot:
        """Return what a module holds now."""
        attributes = dict(vars(module))
        contents = {
            name: value.copy()
            for name, value in attributes.items()
            if type(value) in _CONTAINERS and name not in _OF_EVERY_MODULE and len(value) <= _LARGEST
        }
        return _Snapshot(module, dict(buffers_of(module)), attributes, contents)

    def is_current(self) -> bool:
        """Return whether the module still holds it."""
        now, buffers = vars(self.module), buffers_of(self.module)
        if not (_hold_the_same(now, self.attributes) and _hold_the_same(buffers, self.buffers)):
            return False
        return all(_are_same(now[name], contents) for name, contents in self.contents.items())

    def put_back(self) -> None:
        """Let the module hold it again."""
        for name, buffer in self.buffers.items():
            buffers_of(self.module)[name] = buffer
        attributes = vars(self.module)
        for name in attributes.keys() - self.attributes.keys():
            del attributes[name]
        attributes.update(self.attributes)
        for name, contents in self.contents.items():
            _fill(self.attributes[name], contents)


def _hold_the_same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return whether two dictionaries have the same names and values, by identity, in one order."""
    # By `keys()`, as the buffers of a scripted module are no real dictionary.
    return len(a) == len(b) and all(map(is_, a.values(), b.values())) and all(map(eq, a.keys(), b.keys()))


def _are_same(a: Any, b: Any) -> bool:
    """Return whether two containers have the same entries, by identity."""
    if isinstance(a, set):
        return bool(a == b)
    return len(a) == len(b) and all(x is y for x, y in zip(_entries(a), _entries(b), strict=True))


def _entries(container: Any) -> Iterator[Any]:
    return chain.from_iterable(container.items()) if isinstance(container, dict) else iter(container)


def _fill(container: Any, contents: Any) -> None:
    if isinstance(container, list):
        container[:] = contents
    elif isinstance(container, deque):
        container.clear()
        container.extend(contents)
    else:
        container.clear()
        container.update(contents)
