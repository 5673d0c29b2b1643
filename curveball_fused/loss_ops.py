"""The operators on a model's outputs, under their public name; `ops.losses` documents them."""

from .ops.losses import (
    bce_cotangent,
    bce_products,
    cross_entropy_cotangent,
    cross_entropy_products,
    mse_cotangent,
    mse_products,
)

__all__ = [
    "bce_cotangent",
    "bce_products",
    "cross_entropy_cotangent",
    "cross_entropy_products",
    "mse_cotangent",
    "mse_products",
]
