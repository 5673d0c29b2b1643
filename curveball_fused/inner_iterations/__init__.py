"""More iterations on one linearization: conjugate gradients, for steps that are nearer to Newton's."""

from .iterated import iterated
from .trial import Trial

__all__ = ["Trial", "iterated"]
