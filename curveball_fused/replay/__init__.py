"""Run a model again as the same function."""

from .replay import Replay

__all__ = ["Replay"]
