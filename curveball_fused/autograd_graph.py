"""The graph that autograd has made of a tensor."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node


def nodes_of(tensor: Tensor) -> Iterator[Node]:
    """Yield each node of the tensor's graph once, those of leaves included."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            nodes += [following for following, _ in node.next_functions]
