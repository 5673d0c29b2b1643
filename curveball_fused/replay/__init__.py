"""Run a model again as the same function."""

from .memory import Unrepeatable
from .replay import Replay

__all__ = ["Replay", "Unrepeatable"]
