"""Rules for recurrent layers, of whose fused kernels torch has no tangents.

With the states of all steps, which the first product computes again, all gates are matrix products over all steps at
once, and so is what of their tangents does not depend on the step before. That leaves a small product and a few sums
for each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .context import Map, Rule, RuleContext, Tangents, tangent_at


class Weights(NamedTuple):
    """Those of one layer in one direction, their tangents, or the slots of these; None for what is zero.

    Attributes:
        w: from the inputs, gates · width x inputs.
        u: from the states before, gates · width x width.
        b: bias of the products with w.
        c: bias of the products with u.
    """

    w: Any
    u: Any
    b: Any = None
    c: Any = None


class Run(NamedTuple):
    """What one layer has read in one direction, steps x rows x features, in the order in which it read it.

    Attributes:
        weights: of the layer.
        x: its inputs.
        before: h before each step.
        kept: what tangents are multiplied by, as its kind of cell has it.
    """

    weights: Weights
    x: Tensor
    before: Tensor
    kept: tuple[Tensor, ...] = ()

    def gates(self) -> tuple[Tensor, Tensor]:
        """Return Wx + b and Uh + c of all steps."""
        w, u, b, c = self.weights
        return F.linear(self.x, w, b), F.linear(self.before, u, c)

    def tangent_of_inputs(self, d: Weights, dx: Tensor | None) -> Tensor:
        """Return that of Wx + b."""
        return _add_product(self.weights.w, dx, _add_product(d.w, self.x, self._bias(d.b)))

    def tangent_of_states(self, d: Weights, others: Tensor | None = None) -> Tensor:
        """Return that of Uh + c without ḣ, and others beside it, in their memory."""
        if others is None or d.c is not None:
            others = self._bias(d.c) if others is None else others.add_(d.c)
        return _add_product(d.u, self.before, others)

    def _bias(self, tangent: Tensor | None) -> Tensor:
        filled = self.x.new_zeros(*self.x.shape[:2], len(self.weights.w))
        return filled if tangent is None else filled.copy_(tangent)


class Kind(NamedTuple):
    """A kind of cell.

    Attributes:
        function: of torch, that computes it.
        keep: given a run, h after each step and the first states, returns what tangents are multiplied by.
        tangent: given a run, the tangents of its weights, inputs and first states, returns that of its outputs, and
            those of the last states.
    """

    function: Any
    keep: Callable[[Run, Tensor, Sequence[Tensor]], tuple[Tensor, ...]]
    tangent: Callable[[Run, Weights, Tensor | None, Sequence[Tensor]], tuple[Tensor, tuple[Tensor, ...]]]


def keep_lstm(run: Run, after: Tensor, first: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """i, f, o = σ(a), g = tanh(a), a = Wx + Uh; c ← f c + i g; h ← o tanh(c): ∂c/∂(i, f, g), ∂h/∂o by a; f; ∂h/∂c."""
    of_inputs, of_states = run.gates()
    i, f, g, o = of_inputs.add_(of_states).chunk(4, 2)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cells = [first[1]]
    for f_t, new in zip(f.unbind(), (i * g).unbind(), strict=True):
        cells.append(torch.addcmul(new, f_t, cells[-1]))
    c = torch.stack(cells)
    t = c[1:].tanh()
    by_gates = (g * i * (1 - i), c[:-1] * f * (1 - f), i * (1 - g * g), t * o * (1 - o))
    return torch.stack(by_gates, 1), f, o * (1 - t * t)


def lstm_tangent(run: Run, d: Weights, dx: Tensor | None, first: Sequence[Tensor]) -> Any:
    """ȧ = Ẇx + Wẋ + U̇h + Uḣ;  ċ ← f ċ + Σ ∂c/∂a ȧ;  ḣ ← ∂h/∂o ȧ + ∂h/∂c ċ."""
    (h, c), outputs = first, []
    a = _by_gates(run.tangent_of_states(d, run.tangent_of_inputs(d, dx)), 4)
    u = _transposed(run.weights.u, 4)
    for a_t, by_gates, f, by_c in zip(a.unbind(), *(t.unbind() for t in run.kept), strict=True):
        i, forget, g, o = torch.baddbmm(a_t, h.expand(4, *h.shape), u).mul_(by_gates).unbind()
        c = torch.addcmul(i, f, c).add_(forget).add_(g)
        h = torch.addcmul(o, by_c, c)
        outputs.append(h)
    return torch.stack(outputs), (h, c)


def keep_gru(run: Run, after: Tensor, first: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """r, z = σ(a + e), n = tanh(a + r e), a = Wx, e = Uh; h ← n + z (h - n): ∂h/∂(r, z, n) by a, the same by e; z."""
    of_inputs, of_states = run.gates()
    (a_r, a_z, a_n), (e_r, e_z, e_n) = of_inputs.chunk(3, 2), of_states.chunk(3, 2)
    r, z = (a_r + e_r).sigmoid_(), (a_z + e_z).sigmoid_()
    n = torch.addcmul(a_n, r, e_n).tanh_()
    by_n = (1 - z) * (1 - n * n)
    by_r, by_z = by_n * e_n * r * (1 - r), (run.before - n) * z * (1 - z)
    return torch.stack((by_r, by_z, by_n), 1), torch.stack((by_r, by_z, by_n * r), 1), z


def gru_tangent(run: Run, d: Weights, dx: Tensor | None, first: Sequence[Tensor]) -> Any:
    """ḣ ← z ḣ + Σ ∂h/∂a ȧ + Σ ∂h/∂e ė, with ȧ = Ẇx + Wẋ, ė = U̇h + Uḣ."""
    (h,), outputs = first, []
    by_inputs, by_states, z = run.kept
    constant = _by_gates(run.tangent_of_inputs(d, dx), 3).mul_(by_inputs)
    constant = constant.addcmul_(_by_gates(run.tangent_of_states(d), 3), by_states).sum(1)
    u = _transposed(run.weights.u, 3)
    for one, by_gates, z_t in zip(constant.unbind(), by_states.unbind(), z.unbind(), strict=True):
        r, forget, n = torch.bmm(h.expand(3, *h.shape), u).mul_(by_gates).unbind()
        h = torch.addcmul(one, z_t, h).add_(r).add_(forget).add_(n)
        outputs.append(h)
    return torch.stack(outputs), (h,)


def keep_elman(
    slope: Callable[[Tensor], Tensor], run: Run, after: Tensor, first: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """h ← φ(Wx + Uh): φ', which is a function of h."""
    return (slope(after),)


def elman_tangent(run: Run, d: Weights, dx: Tensor | None, first: Sequence[Tensor]) -> Any:
    """ḣ ← φ' (Ẇx + Wẋ + U̇h + Uḣ)."""
    (h,), outputs = first, []
    a, u = run.tangent_of_states(d, run.tangent_of_inputs(d, dx)), run.weights.u.t()
    for a_t, by in zip(a.unbind(), run.kept[0].unbind(), strict=True):
        h = torch.addmm(a_t, h, u).mul_(by)
        outputs.append(h)
    return torch.stack(outputs), (h,)


def _add_product(w: Tensor | None, x: Tensor | None, total: Tensor) -> Tensor:
    """Add x wᵀ to the total, in its memory, unless one of them is zero."""
    if w is not None and x is not None:
        total.view(-1, len(w)).addmm_(x.reshape(-1, w.shape[1]), w.t())
    return total


def _by_gates(a: Tensor, gates: int) -> Tensor:
    """Return steps x gates x rows x width, contiguous, of steps x rows x gates · width."""
    apart: Tensor = a.unflatten(2, (gates, -1))
    return apart.transpose(1, 2).contiguous()


def _transposed(u: Tensor, gates: int) -> Tensor:
    """Return the transposed matrix of each gate, contiguous."""
    apart: Tensor = u.unflatten(0, (gates, -1))
    return apart.mT.contiguous()


class Layers:
    """The tangents of all results of a recurrent layer, or of several on top of each other, in one or both directions.

    Args:
        kind: of its cells.
        x: inputs, rows first if `batch_first`, else steps.
        first: h, and what else a cell has, before the first step, layers x rows x width.
        weights: those of each layer and direction.
        at_x: the slot of the tangent of x; None for a constant.
        at_first: those of the first states.
        at_weights: those of the weights.
        directions: 1, or 2 where every second layer reads the steps from the last to the first.
        batch_first: whether inputs and outputs have rows first.
    """

    def __init__(
        self,
        kind: Kind,
        x: Tensor,
        first: Sequence[Tensor],
        weights: Sequence[Weights],
        at_x: int | None,
        at_first: Sequence[int | None],
        at_weights: Sequence[Weights],
        directions: int,
        batch_first: bool,
    ) -> None:
        self._kind = kind
        self._x, self._first, self._weights = x, first, weights
        self._at_x, self._at_first, self._at_weights = at_x, at_first, at_weights
        self._directions, self._batch_first = directions, batch_first
        self._runs: list[Run] = []
        self._last: tuple[Tangents, dict[int, Tensor]] | None = None  # of the results, which come together

    def map_of(self, index: int) -> Map:
        """Return the map of one of the results: outputs, and the last of each state."""
        return partial(self._of, index)

    def _of(self, index: int, tangents: Tangents) -> Tensor:
        if self._last is None or self._last[0] is not tangents:
            self._runs = self._runs or self._run()
            self._last = tangents, dict(enumerate(self._product(tangents)))
        return self._last[1].pop(index)

    def _run(self) -> list[Run]:
        """Return what all products read of the layers, in their order."""
        x, runs = self._steps_first(self._x), []
        for i in range(0, len(self._weights), self._directions):
            outputs = self._outputs_of(i, x)
            for j, after in enumerate(outputs.chunk(self._directions, 2)):
                first = [state[i + j] for state in self._first]
                after = _in_order(after, j)
                before = torch.cat((first[0][None], after[:-1]))
                run = Run(self._weights[i + j], _in_order(x, j), before)
                runs.append(run._replace(kept=self._kind.keep(run, after, first)))
            x = outputs
        return runs

    def _outputs_of(self, i: int, x: Tensor) -> Tensor:
        """Return the outputs of the layer that begins with the weights of this index, for these inputs.

        Those that the call has returned may have been written to by way of `.data`, which autograd lets pass.
        """
        first = [state[i : i + self._directions] for state in self._first]
        weights = [t for each in self._weights[i : i + self._directions] for t in each if t is not None]
        has_biases = self._weights[i].b is not None
        hx = first if len(first) > 1 else first[0]
        options = (has_biases, 1, 0.0, False, self._directions == 2, False)
        outputs: Tensor = self._kind.function(x, hx, weights, *options)[0]
        return outputs

    def _product(self, tangents: Tangents) -> tuple[Tensor, ...]:
        x = tangent_at(tangents, self._at_x)
        dx = None if x is None else self._steps_first(x)
        states = [tangent_at(tangents, at) for at in self._at_first]
        first = [torch.zeros_like(h) if t is None else t for t, h in zip(states, self._first, strict=True)]
        last: list[tuple[Tensor, ...]] = []
        for i in range(0, len(self._runs), self._directions):
            outputs = []
            for j in range(self._directions):
                d = Weights(*(tangent_at(tangents, at) for at in self._at_weights[i + j]))
                ordered = None if dx is None else _in_order(dx, j)
                result, left = self._kind.tangent(self._runs[i + j], d, ordered, [state[i + j] for state in first])
                outputs.append(_in_order(result, j))
                last.append(left)
            dx = torch.cat(outputs, 2) if self._directions > 1 else outputs[0]
        assert dx is not None
        return self._steps_first(dx), *(torch.stack(each) for each in zip(*last, strict=True))

    def _steps_first(self, t: Tensor) -> Tensor:
        """Exchange steps and rows where the rows are first, or are to be."""
        return t.transpose(0, 1) if self._batch_first else t


def _in_order(x: Tensor, direction: int) -> Tensor:
    return x.flip(0) if direction else x


def recurrent(
    kind: Kind,
    ctx: RuleContext,
    input: Tensor,
    hx: Any,
    params: Any,
    has_biases: Any,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """One of torch's recurrent layers: the tangents of its outputs and last states, found together."""
    if not isinstance(has_biases, bool):  # a packed sequence, for which the arguments are others
        return NotImplemented
    if input.numel() == 0 or input.dtype not in (torch.float32, torch.float64):
        return NotImplemented
    first = list(hx) if isinstance(hx, (tuple, list)) else [hx]
    if (dropout > 0 and train and num_layers > 1) or torch.is_autocast_enabled(input.device.type):
        return NotImplemented
    if params[1].shape[1] != first[-1].shape[-1]:  # its outputs are projections
        return NotImplemented
    each = 4 if has_biases else 2

    def weights_of(values: Sequence[Any]) -> list[Weights]:
        return [Weights(*values[i : i + each]) for i in range(0, len(values), each)]

    inputs, states, weights = ctx.save(input), [ctx.save(h) for h in first], weights_of([ctx.save(p) for p in params])
    results = kind.function(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
    layers = Layers(
        kind,
        inputs,
        states,
        weights,
        at_x=ctx.tangent_index(input),
        at_first=[ctx.tangent_index(h) for h in first],
        at_weights=weights_of([ctx.tangent_index(p) for p in params]),
        directions=2 if bidirectional else 1,
        batch_first=batch_first,
    )
    return results, [layers.map_of(i) for i in range(len(results))]


_KINDS = [
    Kind(torch.lstm, keep_lstm, lstm_tangent),
    Kind(torch.gru, keep_gru, gru_tangent),
    Kind(torch.rnn_tanh, partial(keep_elman, lambda h: 1 - h * h), elman_tangent),
    Kind(torch.rnn_relu, partial(keep_elman, lambda h: (h > 0).to(h.dtype)), elman_tangent),
]
RULES: dict[Any, Rule] = {kind.function: partial(recurrent, kind) for kind in _KINDS}
