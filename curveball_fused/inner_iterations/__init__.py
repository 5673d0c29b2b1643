"""More iterations on one linearization: conjugate gradients, for steps that are nearer to Newton's."""

from .iterated import Iterated, iterated
from .trial import Trial

__all__ = ["Iterated", "Trial", "iterated"]
