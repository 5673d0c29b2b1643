"""Debug mode's copy of one torch call, which can be made again and again, as the same function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from curveball_fused.curvature import rules
from curveball_fused.curvature.arguments import map_nested
from curveball_fused.curvature.rules import RuleContext, tensors
from curveball_fused.replay.generators import Saved, positions


class RecordedCall:
    """A call that can be made again and again, as the same function, without touching anything of the model.

    Attributes:
        func, name: the function and its name.
        args, kwargs: copies of the arguments.
        device: of the first tensor among them.
        active: copies of the arguments that require gradients.
    """

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.name = func, name_of(func)
        self.device = tensors((args, list(kwargs.values())))[0].device
        self.active: list[Tensor] = []
        self._generators, self._positions = Saved(self.device), positions(self.device)
        self.args, self.kwargs = _mapped((args, kwargs), self._record)
        self._slots = {id(t): slot for slot, t in enumerate(self.active)}
        self._random: bool | None = None

    def _record(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = value.detach().clone()
        if value.requires_grad:
            self.active.append(copy)
        return copy

    def __call__(self, function: Any, replace: Callable[[Any], Any] | None = None) -> tuple[Any, tuple[Any, ...]]:
        """Call `function` instead of the recorded one, with generators where they stood then.

        Args:
            function: called with copies of the recorded arguments.
            replace: changes each argument; the default copies it.

        Returns:
            What `function` returns, and the positional arguments that it got.
        """
        args, kwargs = _mapped((self.args, self.kwargs), replace or _copied)
        self._generators.rewind()
        return function(*args, **kwargs), args

    @property
    def is_random(self) -> bool:
        """Whether the call draws random numbers, which would be different in another precision."""
        if self._random is None:
            with torch.no_grad():
                self(self.func)
            self._random = positions(self.device) != self._positions
        return self._random

    def directions(self) -> list[Tensor]:
        """Return random tangents of the arguments' own size; the same for the same call."""
        generator = torch.Generator(self.device).manual_seed(0)
        found = []
        for t in self.active:
            sizes = t[t.isfinite() & (t != 0)].abs().double()
            # A low quantile, as a mask may have put huge numbers among the elements.
            scale = float(sizes.kthvalue(1 + sizes.numel() // 4).values) if sizes.numel() else 1.0
            v = torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device)
            found.append(v * min(scale, 1e6))
        return found

    def without_padding(self, v: list[Tensor]) -> list[Tensor]:
        """Return `v` without an embedding's row of padding, a constant although the function reads it."""
        if self.name != "embedding" or len(v) != 1:
            return v
        padding = self.kwargs.get("padding_idx", self.args[2] if len(self.args) > 2 else None)
        if padding is None or (self.func is torch.embedding and padding < 0):
            return v
        (rows,) = v
        return [rows.index_fill(0, torch.tensor([padding % len(rows)], device=rows.device), 0)]

    def moved(self, v: list[Tensor], step: float, dtype: torch.dtype | None) -> tuple[Any, tuple[Any, ...]]:
        """Make the call at x + step · v.

        Args:
            v: tangents of the active arguments.
            step: how far to go along v.
            dtype: float64 to compute in double precision; None for the arguments' own.

        Returns:
            As `__call__`.
        """

        def replace(value: Any) -> Any:
            slot = self._slots.get(id(value))
            wide = _widened(value) if dtype is torch.float64 else _copied(value)
            return wide if slot is None else wide.add_(v[slot].to(wide.dtype), alpha=step)

        with torch.no_grad():
            return self(self.func, replace)

    def leaves(self) -> tuple[list[Tensor], Callable[[Any], Any]]:
        """Return leaves of a graph for the active arguments, and what replaces these by copies of the leaves."""
        leaves = [t.clone().requires_grad_() for t in self.active]

        def replace(value: Any) -> Any:
            slot = self._slots.get(id(value))
            return _copied(value) if slot is None else leaves[slot].clone()

        return leaves, replace

    def dual(self, v: list[Tensor]) -> Callable[[Any], Any]:
        """Return what replaces the active arguments by dual numbers of tangents `v`."""

        def replace(value: Any) -> Any:
            slot = self._slots.get(id(value))
            return _copied(value) if slot is None else fwAD.make_dual(value.clone(), v[slot].clone())

        return replace

    def by_rule(self) -> tuple[list[Tensor], list[Any], list[Tensor]] | None:
        """Return results, the map of each and the leaves; None where the tape has no rule that takes the call."""
        rule = rules.RULES.get(self.func) or rules.IN_PLACE.get(self.func)
        if rule is None or any(t.is_complex() for t in self.active):
            return None
        slots: dict[int, int | None] = {}
        leaves, put = self.leaves()

        def replace(value: Any) -> Any:
            copy = put(value)
            if isinstance(copy, Tensor):
                slots[id(copy)] = self._slots.get(id(value))
            return copy

        try:
            recorded, _ = self(lambda *args, **kwargs: rule(RuleContext(slots, "auto"), *args, **kwargs), replace)
        except TypeError:
            return None
        if recorded is NotImplemented:
            return None
        result, maps = recorded
        return ([result], [maps], leaves) if isinstance(result, Tensor) else (list(result), list(maps), leaves)


def results_of(result: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """Return the tensors among the results; the first argument, for a call that writes to it and returns nothing."""
    found = [t for t in tensors((result,)) if t.is_floating_point() or t.is_complex()]
    return [args[0]] if result is None and args and isinstance(args[0], Tensor) else found


def name_of(func: Any) -> str:
    """Return the function's name; that of the attribute, for one that reads it."""
    name = str(getattr(func, "__name__", func))
    return str(func.__self__.__name__) if name == "__get__" else name


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Put the generators back at the end of the block."""
    saved = Saved(device)
    try:
        yield
    finally:
        saved.rewind()


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return nested arguments with each leaf changed; a tensor that occurs twice is changed once."""
    made: dict[int, tuple[Any, Any]] = {}

    def once(value: Any) -> Any:
        if id(value) not in made:
            made[id(value)] = (value, change(value))
        return made[id(value)][1]

    return map_nested(once, value)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _widened(value: Any) -> Any:
    """Return a tensor, or the name of a dtype, in double precision."""
    dtype = value if isinstance(value, torch.dtype) else getattr(value, "dtype", None)
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype.is_complex):
        return _copied(value)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return wide if isinstance(value, torch.dtype) else value.to(wide, copy=True)
