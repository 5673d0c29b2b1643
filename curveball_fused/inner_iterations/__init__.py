"""More iterations on one linearization: conjugate gradients, for steps that are nearer to Newton's."""

from .conjugate_gradients import improved
from .curvature_factors import CurvatureFactors
from .trial import Trial

__all__ = ["CurvatureFactors", "Trial", "improved"]
