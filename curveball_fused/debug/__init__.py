"""Debug mode: the products of a step, and the derivative of each call, against finite differences."""

from .step_checks import Step, check, suspects

__all__ = ["Step", "check", "suspects"]
