"""The Jacobian J = ∂f/∂w of a model at its parameters, as products v ↦ Jv and u ↦ Jᵀu, without ever forming it."""

from .linear_map import LinearMap, MethodUnsupported, ModelFn, Pullback, checked_outputs, evaluate
from .methods import AUTO, METHODS, Method, linearize

__all__ = [
    "AUTO",
    "METHODS",
    "LinearMap",
    "Method",
    "MethodUnsupported",
    "ModelFn",
    "Pullback",
    "checked_outputs",
    "evaluate",
    "linearize",
]
