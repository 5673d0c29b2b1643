"""Where the figures of a training go: a CSV file, TensorBoard or whatever has its interface, a picture."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from curveball_fused import state
from curveball_fused.advice import advise
from curveball_fused.optimizer import CurveBall
from curveball_fused.settings import Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Path = str | os.PathLike[str]

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#7b3294")  # told apart by color-blind readers too
_PANELS = {  # in the order of `axes`
    "loss": "loss",
    "lambd": r"damping $\lambda$",
    "beta": r"step size $\beta$",
    "rho": r"momentum $\rho$",
    "ratio": r"$\gamma$, actual / predicted",
}
_SHOWN = {"rho": (-0.1, 1.5), "ratio": (-1.0, 4.0)}  # single values may be far away, and flatten all others
_MEAN = "curveball mean"  # marks lines


class Writer(Protocol):
    """What has TensorBoard's `SummaryWriter.add_scalar`."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> object:
        """Log a value."""


def diagnose(optimizer: CurveBall) -> list[str]:
    r"""Return what the last steps say about the training and what to try, as `history()` warns of it.

    Args:
        optimizer: of the training.

    Returns:
        A sentence or two for each kind of warning of docs/monitoring.md that holds now; most often none.

    Example::

        print(*diagnose(optimizer), sep="\n")
    """
    shared = optimizer._current()
    return list(advise(state.history_rows(shared), shared, Settings.of(optimizer)).values())


def write_csv(optimizer: CurveBall, path: Path) -> None:
    """Write `optimizer.history()` to a CSV file; called again, add the steps since.

    A row for each step, in full precision, under a header of "step" and the names of the figures. A history holds 1024
    steps: if there were more since the last call, those in between are missing, as the numbers of the steps show. A
    training that goes on from a checkpoint goes on in its file, too, from the checkpoint's step.

    Args:
        optimizer: whose history it is.
        path: of the file, which is made if there is none.

    Raises:
        ValueError: the file is another training's, or not by this function. It has not been changed.

    Example::

        for epoch in range(epochs):
            train(model, optimizer)
            write_csv(optimizer, "history.csv")
    """
    history = optimizer.history()
    header, *rows = _lines([list(history), *_rows(history)])
    first = int(history["step"][0]) if rows else 1
    with open(path, "ab+") as file:
        file.seek(0)
        kept = 0  # bytes: header and steps before the history's first
        for line in file:
            if kept == 0 and not header.startswith(line):
                raise ValueError(f"{path} is not by this version's write_csv: give another path.")
            if not line.endswith(b"\n"):  # the call that wrote it did not come to its end
                break
            if kept > 0 and (place := int(line.partition(b",")[0]) - first) >= 0:
                if line not in rows[place : place + 1]:
                    raise ValueError(f"{path} has the steps of another training: give another path, or delete it.")
                break
            kept += len(line)
        file.truncate(kept)
        file.write(b"".join(rows if kept else [header, *rows]))


def log_to_tensorboard(optimizer: CurveBall, writer: Writer, prefix: str = "curveball/") -> None:
    """Log `optimizer.history()`, each figure at the step that it is of; called again, the steps since.

    If there were more than 1024 steps since the last call, those before the last 1024 are left out.

    Args:
        optimizer: whose history it is.
        writer: a `torch.utils.tensorboard.SummaryWriter`, or whatever else has `add_scalar(tag, value, step)`.
        prefix: of the tags (default: "curveball/").

    Raises:
        TypeError: the writer has no `add_scalar`.

    Example::

        writer = SummaryWriter()
        for epoch in range(epochs):
            train(model, optimizer)
            log_to_tensorboard(optimizer, writer)
    """
    if not hasattr(writer, "add_scalar"):
        raise TypeError(f"writer must have add_scalar, as SummaryWriter(folder) does; got {type(writer).__name__}.")
    history = optimizer.history()
    logged = _logged.setdefault(optimizer, WeakKeyDictionary()).setdefault(writer, {})
    names = list(history)[1:]
    for step, *values in _rows(history):
        if step > logged.get(prefix, 0):
            for name, value in zip(names, values, strict=True):
                if name != "ratio" or not math.isnan(value):  # as γ is before λ first adapts
                    writer.add_scalar(prefix + name, value, int(step))
            logged[prefix] = int(step)


# By optimizer and writer: the last step that was logged under each prefix.
_logged: WeakKeyDictionary[CurveBall, WeakKeyDictionary[Writer, dict[str, int]]] = WeakKeyDictionary()


def plot_history(
    source: CurveBall | Mapping[str, Tensor] | Path, axes: Iterable[Axes] | None = None, label: str | None = None
) -> Figure:
    """Draw loss, λ, β, ρ and γ by steps, with the limits of ρ, γ and λ and the steps that were skipped.

    Needs matplotlib. Thin lines are the figures, thick ones their mean over a fiftieth of the steps. Of ρ are shown
    -0.1 to 1.5, of γ -1 to 4. Limits are the optimizer's, or the default ones where it is not given.

    Args:
        source: an optimizer, what its `history()` has returned, or the path of a file of `write_csv`, which has more
            than the last 1024 steps.
        axes: five of them, for these figures in this order; None for a figure of its own. With those of an earlier
            call, `figure.axes`, trainings are drawn over each other.
        label: a name for the training (default: None).

    Returns:
        The figure, which is not pyplot's unless `axes` are.

    Raises:
        ImportError: there is no matplotlib.
        ValueError: there are no steps to draw, or not five axes.

    Example::

        plot_history(optimizer).savefig("history.png")
    """
    history = _history_of(source)
    if len(history["step"]) == 0:
        raise ValueError("there are no steps to draw yet.")
    figure, panels = _panels(axes)
    color = _COLORS[sum(line.get_gid() == _MEAN for line in panels["loss"].lines) % len(_COLORS)]
    counts = history["skipped_steps"]
    before = counts[:1] if history["step"][0] > 1 else torch.zeros_like(counts[:1])
    skipped = counts.diff(prepend=before) > 0
    for name, panel in panels.items():
        values = history[name].masked_fill(skipped, torch.nan) if name in ("beta", "rho") else history[name]
        _draw(panel, history["step"], values, color, label)
    _draw_skipped(panels["loss"], history["step"][skipped], color, label)
    _draw_limits(panels, history, source)
    if panels["loss"].get_legend_handles_labels()[0]:
        panels["loss"].legend(frameon=False, loc="upper right")
    return figure


def _panels(axes: Iterable[Axes] | None) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure and its axes by the names of figures, new ones or those given."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_history needs matplotlib: pip install matplotlib") from error
    if axes is None:
        new = Figure(figsize=(9, 4.5), layout="constrained").subplot_mosaic(
            [["loss", "lambd", "beta"], ["loss", "rho", "ratio"]], width_ratios=(1.6, 1, 1), sharex=True
        )
        axes = [new[name] for name in _PANELS]
    given = list(axes)
    if len(given) != len(_PANELS):
        raise ValueError(f"axes must be {len(_PANELS)}, for {', '.join(_PANELS)}; got {len(given)}.")
    panels = dict(zip(_PANELS, given, strict=True))
    for name, panel in panels.items():
        panel.set_title(_PANELS[name], fontsize=10, loc="left")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if name in ("loss", "rho", "ratio"):
            panel.set_xlabel("step")
    return cast("Figure", given[0].figure), panels


def _draw(panel: Axes, step: Tensor, values: Tensor, color: str, label: str | None) -> None:
    """Draw the values, thin, and their mean over a fiftieth of the steps."""
    values = values.where(values.isfinite(), torch.nan)
    window = 1 + len(step) // 50
    mean = values.unfold(0, window, 1).nanmean(1)
    panel.plot(step, values, color=color, linewidth=0.8, alpha=0.35)
    panel.plot(step[window // 2 :][: len(mean)], mean, color=color, linewidth=1.8, label=label, gid=_MEAN)


def _draw_skipped(panel: Axes, skipped: Tensor, color: str, label: str | None) -> None:
    """Mark skipped steps at the lower edge, as their losses may be none."""
    if len(skipped):
        said = f"{len(skipped)} skipped" if label is None else f"{label}: {len(skipped)} skipped"
        edge = panel.get_xaxis_transform()
        panel.plot(skipped, [0.03] * len(skipped), "x", color=color, label=said, transform=edge)


def _draw_limits(panels: Mapping[str, Axes], history: Mapping[str, Tensor], source: Any) -> None:
    """Draw the limits of γ, of ρ, and of λ where it has come to one; scale the axes."""
    defaults: Any = CurveBall.__init__.__kwdefaults__
    options = source.param_groups[0] if isinstance(source, CurveBall) else defaults
    limits = {"ratio": (options["lambda_low"], options["lambda_high"]), "rho": (1.0,)}
    limits["lambd"] = tuple(b for b in (options["lambda_min"], options["lambda_max"]) if (history["lambd"] == b).any())
    for name, bounds in limits.items():
        for bound in bounds:
            panels[name].axhline(bound, color="#5f6b76", linewidth=1, linestyle="--", zorder=1)
    for name in ("loss", "lambd", "beta"):
        values = history[name]
        if (values > 0).any() and not (values < 0).any():
            panels[name].set_yscale("log", nonpositive="mask")
    for name, ends in _SHOWN.items():
        panels[name].set_ylim(ends)


def _history_of(source: CurveBall | Mapping[str, Tensor] | Path) -> Mapping[str, Tensor]:
    if isinstance(source, CurveBall):
        return source.history()
    if isinstance(source, Mapping):
        return source
    with open(source, newline="", encoding="utf-8") as file:
        names, *rows = csv.reader(file)
    values = torch.tensor([[float(text) for text in row] for row in rows], dtype=torch.float64, device="cpu")
    return dict(zip(names, values.reshape(-1, len(names)).unbind(1), strict=True))


def _rows(history: Mapping[str, Tensor]) -> Iterable[tuple[float, ...]]:
    return zip(*(values.tolist() for values in history.values()), strict=True)


def _lines(rows: Iterable[Sequence[Any]]) -> list[bytes]:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode().splitlines(keepends=True)
