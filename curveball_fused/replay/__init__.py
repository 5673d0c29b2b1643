"""Run a model again as the same function."""

from .replay import Replay, Unrepeatable

__all__ = ["Replay", "Unrepeatable"]
