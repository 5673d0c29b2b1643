"""The operators: on parameters and on the numbers of a step (here), on outputs (`losses`), on tangents (`tangents`).

Each is one function that takes the name of a backend, `backend="auto"` for the best that runs where the tensors are.
"""

from . import losses, tangents
from ._coefficients import keep_coefficients
from ._damping import adapt_damping
from ._solve import solve
from .bases import precondition_in_bases, update_statistics_
from .parameters import dots, update_, update_groups_
from .preconditioners import precondition_

__all__ = [
    "adapt_damping",
    "dots",
    "keep_coefficients",
    "losses",
    "precondition_",
    "precondition_in_bases",
    "solve",
    "tangents",
    "update_",
    "update_groups_",
    "update_statistics_",
]
