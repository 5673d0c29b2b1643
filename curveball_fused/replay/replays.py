"""The runs of a batch in parts: one `Replay` for each part, in the order in which the parts run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .replay import Replay, Result


class Replays:
    """Make every later run of each part the same function as its first, however many parts have run since.

    Args:
        params: the optimized parameters.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self._each: list[Replay] = []

    def __getitem__(self, i: int) -> Replay:
        """Return that of part `i`; it is made when the parts before it have run, and notes where the generators are."""
        if i == len(self._each):
            if self._each:
                self._each[-1].close()
            self._each.append(self.scratch())
        return self._each[i]

    def close(self) -> None:
        """Note that all parts have run; to be called where there are several, before one of them runs again."""
        self._each[-1].close()

    def scratch(self) -> Replay:
        """Return one for a run of which nothing is to stay."""
        return Replay(self._params, self._params[0].device)

    def scratches(self) -> Replays:
        """Return those of runs of all parts, of which nothing is to stay."""
        return Replays(self._params)

    def again_at_new_weights(self, functions: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run the parts from the state before the first, but for the parameters, which have moved; leave all as now."""
        if len(self._each) == 1:
            return [self._each[0].again_at_new_weights(functions[0])]
        moved = [replay.written_parameters() for replay in self._each]
        results = []
        try:
            self.rewind()
            for replay, function in zip(self._each, functions, strict=True):
                for snapshot in moved:
                    snapshot.put_back()
                results.append(replay.run_again(function))
        finally:
            self.finish()
            for snapshot in moved:
                snapshot.put_back()
        return results

    def rewind(self) -> None:
        """Put back what the runs changed: the state before the first part."""
        for replay in reversed(self._each):
            replay.rewind()

    def finish(self) -> None:
        """Leave the state as the first runs of all parts have left it."""
        for replay in self._each:
            replay.finish()

    def modules(self) -> list[nn.Module]:
        """Return the modules that the first runs have called."""
        return list(dict.fromkeys(module for replay in self._each for module in replay.modules()))

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Those of the results of the first runs."""
        return set().union(*(replay.dtypes for replay in self._each))
