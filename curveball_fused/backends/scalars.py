"""The layout of the scalars of a step, one float64 tensor on the device, so that no value has to visit the host."""

from __future__ import annotations

SCALARS = (
    "beta",
    "rho",
    "lambd",
    "z_dot_z",
    "linear_term",
    "quadratic_term",
    "predicted_change",
    "ratio",
    "loss",
    "skipped_steps",
    "safe_steps",
    "direction_damping",  # s = θλ of the last solve, by which Δ = u + s z
    "average_beta",
    "average_rho",
    "solves",  # how many are in these averages
    "gathered",
)
BETA, RHO, LAMBD, Z_DOT_Z, LINEAR_TERM, QUADRATIC_TERM, PREDICTED_CHANGE, RATIO, LOSS, SKIPPED_STEPS, SAFE_STEPS = (
    range(11)
)
DIRECTION_DAMPING, AVERAGE_BETA, AVERAGE_RHO, SOLVES, GATHERED = range(11, len(SCALARS))

RANK_TOLERANCE = 1e-12  # 1 - cos² below this: Δ and z are parallel to rounding, and the system has rank one
CONVEX_TOLERANCE = 1e-4  # relative excess of a squared off-diagonal entry that float32 products may show by rounding
