"""The whole step as CUDA graphs."""

from .graphed_step import GraphedStep, make_graphed_step

__all__ = ["GraphedStep", "make_graphed_step"]
