"""What CurveBall would do with a model, and at what cost."""

from .procedure import explain
from .report import Explanation

__all__ = ["Explanation", "explain"]
