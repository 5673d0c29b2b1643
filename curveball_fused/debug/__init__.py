"""Debug mode: the products of a step, and the derivative of each call, against finite differences."""

from .metric_checks import check_metric
from .step_checks import Step, check, suspects

__all__ = ["Step", "check", "check_metric", "suspects"]
