"""The Jacobian J = ∂f/∂w of a model at its parameters, as products v ↦ Jv and u ↦ Jᵀu, without ever forming it."""

from .linear_map import LinearMap, MethodUnsupported, ModelFn, Pullback, checked_outputs, evaluate
from .methods import AUTO, METHODS, Method, by_first_of, refusal, refusals_of

__all__ = [
    "AUTO",
    "METHODS",
    "LinearMap",
    "Method",
    "MethodUnsupported",
    "ModelFn",
    "Pullback",
    "by_first_of",
    "checked_outputs",
    "evaluate",
    "refusal",
    "refusals_of",
]
