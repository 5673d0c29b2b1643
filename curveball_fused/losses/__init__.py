"""The quadratic model of a loss at the outputs of a model: value, gradient and Gauss-Newton products."""

from .loss_model import LossFn, LossModel, checked_loss, loss_at

__all__ = ["LossFn", "LossModel", "checked_loss", "loss_at"]
