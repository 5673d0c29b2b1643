"""What `compile=True` uses of torch's compiler, none of which is stable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table

__all__ = [
    "FailOnRecompileLimitHit",
    "TorchDynamoException",
    "aot_autograd",
    "boxed",
    "compile_fx_inner",
    "detect_fake_mode",
    "fx_graph_cse",
    "inductor_config",
    "min_cut_rematerialization_partition",
    "recompile_limit",
    "select_decomp_table",
]


def boxed(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Mark a compiled graph as one that takes its arguments in a list, which it may empty."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


def recompile_limit() -> int:
    """Return for how many combinations of shapes, modes and modules one function is compiled."""
    limit: int = torch._dynamo.config.recompile_limit
    return limit
