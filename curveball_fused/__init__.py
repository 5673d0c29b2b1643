"""CurveBall, a second-order optimizer at the price of momentum SGD, with fused kernels.

from curveball_fused import CurveBall
optimizer = CurveBall(model.parameters())
loss, outputs = optimizer.step(lambda: model(x), lambda out: F.cross_entropy(out, y))
"""

from importlib.metadata import PackageNotFoundError, version

from . import loss_ops, ops
from .backends import build_info
from .explanation import Explanation, explain
from .optimizer import CurveBall

try:
    __version__ = version("curveball_fused")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["CurveBall", "Explanation", "build_info", "explain", "loss_ops", "ops"]
