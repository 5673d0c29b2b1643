"""CurveBall, a second-order optimizer at the price of momentum SGD, with fused kernels.

Example::

    from curveball_fused import CurveBall

    optimizer = CurveBall(model.parameters(), preconditioner="kronecker")
    loss, outputs = optimizer.step(lambda: model(x), lambda out: F.cross_entropy(out, y))
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from . import loss_ops, ops
from .advice import TrainingWarning
from .backends import build_info
from .optimizer import CurveBall

if TYPE_CHECKING:
    from .cuda_graphs import GraphedStep, make_graphed_step
    from .explanation import Explanation, explain
    from .monitoring import diagnose, log_to_tensorboard, plot_history, write_csv

try:
    __version__ = version("curveball_fused")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "CurveBall",
    "Explanation",
    "GraphedStep",
    "TrainingWarning",
    "build_info",
    "diagnose",
    "explain",
    "log_to_tensorboard",
    "loss_ops",
    "make_graphed_step",
    "ops",
    "plot_history",
    "write_csv",
]
_ON_FIRST_USE = {  # since they import much that ordinary training does not need
    "Explanation": "explanation",
    "explain": "explanation",
    "GraphedStep": "cuda_graphs",
    "make_graphed_step": "cuda_graphs",
    "diagnose": "monitoring",
    "log_to_tensorboard": "monitoring",
    "plot_history": "monitoring",
    "write_csv": "monitoring",
}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(import_module(f"{__name__}.{_ON_FIRST_USE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
