"""Run a model again as the same function."""

from .memory import Unrepeatable
from .replay import Replay
from .replays import Replays

__all__ = ["Replay", "Replays", "Unrepeatable"]
