"""All of torch's private interface that this package uses, but for the compiler's, which is in _torch_compiler.py."""

from __future__ import annotations

from torch._compile import _disable_dynamo as disable_dynamo

__all__ = ["disable_dynamo"]
