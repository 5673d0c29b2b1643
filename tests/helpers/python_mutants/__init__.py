"""Mistakes in the package that the tests must notice: a replacement of text, and a check that must then fail."""

from .mutant import PythonMutant
from .of_model_and_loss import QUADRATIC_MODEL, TAPE_RULES
from .of_parts import PARTS
from .of_preconditioners import PRECONDITIONERS
from .of_steps import MONITORING, REPLAY, SOLVE, STATE

__all__ = ["MUTANTS", "PythonMutant"]

MUTANTS = [
    *TAPE_RULES,
    *QUADRATIC_MODEL,
    *SOLVE,
    *REPLAY,
    *STATE,
    *PRECONDITIONERS,
    *PARTS,
    *MONITORING,
]
