"""The quadratic model of a loss at the outputs of a model: value, gradient and Gauss-Newton products."""

from .loss_model import LossFn, LossGradient, LossModel, checked_loss, loss_gradient
from .missing_curvature import stretch, substituted, with_sixth

__all__ = [
    "LossFn",
    "LossGradient",
    "LossModel",
    "checked_loss",
    "loss_gradient",
    "stretch",
    "substituted",
    "with_sixth",
]
