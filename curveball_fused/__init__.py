"""CurveBall, a second-order optimizer at the price of momentum SGD, with fused kernels.

from curveball_fused import CurveBall
optimizer = CurveBall(model.parameters())
loss, outputs = optimizer.step(lambda: model(x), lambda out: F.cross_entropy(out, y))
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from . import loss_ops, ops
from .backends import build_info
from .optimizer import CurveBall

if TYPE_CHECKING:
    from .explanation import Explanation, explain

try:
    __version__ = version("curveball_fused")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["CurveBall", "Explanation", "build_info", "explain", "loss_ops", "ops"]


def __getattr__(name: str) -> Any:
    """`explain` and `Explanation` on first use: counting multiply-adds imports much that training does not need."""
    if name in ("explain", "Explanation"):
        from . import explanation

        return getattr(explanation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
