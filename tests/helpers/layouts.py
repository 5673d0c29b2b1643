"""Random shapes, and ways to lay a tensor of given shape out in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(),
    "reversed": lambda t: t.permute(list(range(t.dim()))[::-1]).contiguous().permute(list(range(t.dim()))[::-1]),
    "channels last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t.clone(),
    "with gaps": lambda t: torch.stack((t, t), dim=-1)[..., 0],
    "misaligned": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
}
shapes = st.one_of(
    st.sampled_from([(), (0,), (3, 0, 2), (1,), (15,), (16,), (17,), (1, 7, 1, 1), (70_001,)]),
    st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple),
)
layouts = st.sampled_from(list(LAYOUTS))
