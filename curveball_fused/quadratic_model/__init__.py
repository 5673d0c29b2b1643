"""The quadratic model of the loss around the weights: what a step measures before it solves."""

from .context import QuadraticTerms, StepContext
from .measure import measure, measure_with_curvature_batch

__all__ = ["QuadraticTerms", "StepContext", "measure", "measure_with_curvature_batch"]
