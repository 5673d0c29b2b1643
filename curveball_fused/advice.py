"""What the figures of the last steps say to whoever trains: where something is wrong, and what to try.

It is read off rows that are on the CPU already, when the user asks for the history: no step waits for it. Each rule
asks for more than a healthy training ever shows; tests/monitoring/test_advice.py has some of those.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from curveball_fused.backends.scalars import BETA, LAMBD, LOSS, PREDICTED_CHANGE, RATIO, RHO
from curveball_fused.settings import Settings
from curveball_fused.step import intervals
from curveball_fused.user_warnings import warn_user

ADAPTATIONS = 5  # of λ, before anything is said about it
RECENT_ADAPTATIONS = 20  # at most, of which half must be bad
SLOW_STEPS = 200  # before a loss that falls slowly means something
AT_LIMIT = 0.999  # of ρ
SMALL_LR, SMALL_LR_AT_LIMIT = 0.1, 0.5  # below which `lr` is why the loss falls slowly; where ρ is at its limit
# What the solves promise over all these steps, as a part of the loss: below, there is nothing left to be won (or so it
# seems); above, the training moves.
PROMISED = (1e-3, 0.2)
# A predicted change of no more than this, and this part of the loss, is one that rounding hides, as in a net that has
# learned its data: γ says nothing then.
ROUNDING, FULL_ROUNDING, HALF_ROUNDING = 1e-7, 1e-5, 1e-3
STUCK = 10  # steps skipped in a row; fewer, or this part of all, a loss scale may skip as it looks for its size
HALF_SKIPS = 0.05


class TrainingWarning(UserWarning):
    """The figures of a training say that something is wrong with it; the message says what to try."""


def advise(rows: Tensor, shared: dict[str, Any], settings: Settings) -> dict[str, str]:
    """Return what to say about a training, by kind; most often nothing.

    Args:
        rows: float64 [n, scalars] on the CPU: those of the last n steps.
        shared: the numbers of all parameters, of which step and compute_dtype are read, and the guard's where steps
            were skipped.
        settings: the optimizer's options.

    Returns:
        Sentences by "skipped", "lambda_min", "lambda_max", "ratio", "lr" or "rho".
    """
    taken, dtype = ~rows[:, BETA].isnan(), shared["compute_dtype"]
    mismatched = 0 if taken.all() else int(shared["guard"][0])
    found = {"skipped": _skipped(rows, dtype, mismatched, settings.lambd)}
    found["lr"] = _rate(rows[taken], settings)
    found["rho"] = "" if found["lr"] else _momentum(rows[taken], settings)
    if settings.auto_lambda:
        steps = torch.arange(shared["step"] - len(rows), shared["step"], device="cpu")  # from zero, as they are counted
        loss, change = rows[:, LOSS].abs(), rows[:, PREDICTED_CHANGE].abs()
        told = change > ROUNDING + (HALF_ROUNDING if dtype else FULL_ROUNDING) * loss
        adapted = rows[taken & told & (steps % intervals(settings)[1] == 0)]
        kind, text = _damping(adapted[-RECENT_ADAPTATIONS:], settings)
        found[kind] = text
    return {kind: f"curveball_fused: {text}" for kind, text in found.items() if text}


def warn(optimizer: Optimizer, found: dict[str, str]) -> None:
    """Warn of what was found, of each kind once per optimizer, where the package is called from."""
    said = _said.setdefault(optimizer, set())
    for kind, text in found.items():
        if kind not in said:
            said.add(kind)
            warn_user(text, TrainingWarning)


_said: WeakKeyDictionary[Optimizer, set[str]] = WeakKeyDictionary()


def _skipped(rows: Tensor, compute_dtype: torch.dtype | None, mismatched: int, lambd: float) -> str:
    skipped = rows[:, BETA].isnan()
    n, of_loss = int(skipped.sum()), int((skipped & ~rows[:, LOSS].isfinite()).sum())
    if n < (max(STUCK, HALF_SKIPS * len(rows)) if compute_dtype == torch.float16 else 1):
        return ""
    said = f"{n} of the last {len(rows)} steps were skipped"
    if n >= STUCK and skipped[-STUCK:].all():
        said += f", the last {STUCK} of them in a row: nothing moves any more"
    said += "."
    if of_loss:
        said += (
            f" In {of_loss} the loss was not finite: look for NaN in the batch, and for log, sqrt or a division at "
            "zero in the model and the loss."
        )
    if mismatched:
        said += (
            f" In {mismatched} since the training began the Jacobian products were not each other's transpose: "
            "debug=True, for a few steps, names the function."
        )
    if n > of_loss + mismatched and compute_dtype == torch.float16:
        said += (
            f" float16 ends at 65504: compute in bfloat16, or begin with shorter steps, by lambd={_short(10 * lambd)}."
        )
    elif n > of_loss + mismatched:
        said += (
            " The loss was finite and its derivatives were not: loss_fn(model_fn()).backward() within "
            "torch.autograd.detect_anomaly() tells where they become NaN."
        )
    return said


def _damping(adapted: Tensor, settings: Settings) -> tuple[str, str]:
    """Return what to say of the last adaptations of λ, and whether of "lambda_min", "lambda_max" or "ratio"."""
    low, high, least, most = settings.lambda_low, settings.lambda_high, settings.lambda_min, settings.lambda_max
    ratio, lambd = adapted[:, RATIO], adapted[:, LAMBD]
    poor, cautious = ~(ratio >= low) | (adapted[:, PREDICTED_CHANGE] > 0), ratio > high
    n = len(adapted)
    if n < ADAPTATIONS or least == most:
        return "ratio", ""
    last, growth = slice(-ADAPTATIONS, None), settings.lambda_factor**-settings.lambda_interval
    # Or one adaptation away from it, to where a single γ may take it.
    at_least, at_most = (lambd[last] <= growth * least).all(), (growth * lambd[last] >= most).all()
    gamma, median = "γ, the change of the loss over the one predicted, was", float(ratio.nanmedian())
    if at_least and _share(cautious[last]) >= 0.5:
        return "lambda_min", (
            f"λ stays at lambda_min={least:.3g} and would fall further: {gamma} {median:.2g}, above lambda_high. If "
            f"the loss falls too slowly, try lambda_min={_short(least / 100)}."
        )
    if _share(poor) < 0.5 and _share(ratio < 0) < 0.25:
        return "ratio", ""
    too_far = (
        f"In {int(poor.sum())} of the last {n} adaptations of λ {gamma} below lambda_low={low:g} (median {median:.2g}) "
        "as steps go further than the model of the loss holds."
    )
    another = (
        "If two runs on one batch do not give the same loss, by random numbers or state that a step cannot put back, "
        "no λ helps: debug=True, for a few steps, tells."
    )
    if at_most:
        return "lambda_max", (
            f"λ stays at lambda_max={most:.3g} and would grow further. {too_far} Try "
            f"lambda_max={_short(100 * most)} with lambd={_short(10 * most)}, or a larger batch. {another}"
        )
    return "ratio", (
        f"{too_far} λ = {float(lambd[-1]):.2g} grows by {growth - 1:.1%} each time: begin with "
        f"lambd={_short(10 * float(lambd[-1]))} or more, or take a larger batch. {another}"
    )


def _is_slow(taken: Tensor) -> bool:
    """Return whether the loss falls slowly, and not because there is nothing left to be won."""
    if len(taken) < SLOW_STEPS:
        return False
    loss, promised = float(taken[-1, LOSS].abs()), -taken[:, PREDICTED_CHANGE]
    half = len(taken) // 2
    # Where there is nothing left to be won, steps promise ever less.
    steady = float(promised[half:].mean()) >= 0.5 * float(promised[:half].mean())
    return steady and PROMISED[0] * loss <= float(promised.sum()) <= PROMISED[1] * loss


def _is_at_limit(taken: Tensor) -> bool:
    return float(taken[:, RHO].median()) >= AT_LIMIT


def _rate(taken: Tensor, settings: Settings) -> str:
    """Return what to say of `lr`, where it is that of another optimizer and the loss falls slowly."""
    if settings.rho is not None or settings.beta is not None or not _is_slow(taken):
        return ""
    if (lr := max(map(float, settings.lr))) >= (SMALL_LR_AT_LIMIT if _is_at_limit(taken) else SMALL_LR):
        return ""
    return (
        f"In the last {len(taken)} steps the loss fell slowly, as lr={lr:.3g} takes that part of each step: leave it "
        "at 1, since a step finds its own length, unless a schedule has brought it there."
    )


def _momentum(taken: Tensor, settings: Settings) -> str:
    """Return what to say of ρ, where it stays at its limit while the loss falls slowly."""
    if settings.rho is not None or not _is_slow(taken) or not _is_at_limit(taken):
        return ""
    ratio, lambd = float(taken[-1, RATIO]), float(taken[-1, LAMBD])
    said = f"In the last {len(taken)} steps ρ was at its limit, 1, on the median, and the loss fell slowly"
    if settings.preconditioner is None and ratio > settings.lambda_high:
        return (
            f"{said}, as λ = {lambd:.2g} rules: γ = {ratio:.2f} is above lambda_high. Try lambd={_short(lambd / 100)}, "
            'lambda_factor=0.99, by which it falls faster, or preconditioner="kronecker".'
        )
    if settings.preconditioner is None:
        return f'{said}. Try preconditioner="kronecker", or a smaller lambd.'
    return f"{said}. Try lambd={_short(lambd / 10)}."


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def _short(value: float) -> str:
    """Return a number to one digit."""
    return f"{float(f'{value:.1g}'):g}"
