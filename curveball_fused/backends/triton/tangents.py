"""The tangent operators in Triton, each one fused pass over memory."""

from __future__ import annotations

from .activations import activation
from .attention import attention_tangent
from .batch_norm import batch_norm_tangent
from .layer_norm import layer_norm_tangent

__all__ = ["activation", "attention_tangent", "batch_norm_tangent", "layer_norm_tangent"]
