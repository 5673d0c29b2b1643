"""Train with batches that do not fit into memory at once: in parts, of which each step takes a whole.

python examples/accumulation.py
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curveball_fused import CurveBall

torch.manual_seed(0)
inputs = torch.randn(1024, 20)
data = TensorDataset(inputs, inputs[:, :4].argmax(dim=1))
model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 4))
optimizer = CurveBall(model.parameters(), preconditioner="kronecker")

for epoch in range(5):
    for x, y in DataLoader(data, batch_size=240, shuffle=True):  # the last one has 64 samples
        parts = [
            (partial(model, x_i), partial(F.cross_entropy, target=y_i))
            for x_i, y_i in zip(x.split(100), y.split(100), strict=True)  # the last one has 40, or 64
        ]
        loss, outputs = optimizer.step(parts)
    print(f"epoch {epoch}: loss {loss:.4f}")
