"""Train with Lightning Fabric: its optimizer hands the closure on and returns what the step does.

pip install lightning
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curveball_fused import CurveBall


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 5))


def make_data():
    """256 points of 20 numbers, whose class is the largest of 5 linear functions."""
    numbers = torch.Generator().manual_seed(1)
    x = torch.randn(256, 20, generator=numbers)
    return TensorDataset(x, (x @ torch.randn(20, 5, generator=numbers)).argmax(1))


def train(epochs, folder, resume=False):
    fabric = Fabric(accelerator="auto", devices=1)  # precision="bf16-mixed" works as well
    model = make_model()
    model, optimizer = fabric.setup(model, CurveBall(model.parameters(), preconditioner="kronecker"))
    loader = fabric.setup_dataloaders(DataLoader(make_data(), batch_size=32))
    file, state = Path(folder) / "state.ckpt", {"model": model, "optimizer": optimizer}
    if resume:
        fabric.load(file, state)

    for epoch in epochs:
        for x, y in loader:

            def closure():
                # The module inside Fabric's, as that one puts hooks on its outputs; its precision comes from autocast.
                with fabric.autocast():
                    outputs = model.module(x)
                return outputs, lambda outputs: F.cross_entropy(outputs, y)

            loss, _ = optimizer.step(closure)
        fabric.print(f"epoch {epoch}: loss {float(loss):.4f}")

    fabric.save(file, state)
    return model


if __name__ == "__main__":
    train(range(2), "checkpoint")
    model = train(range(2, 4), "checkpoint", resume=True)  # as if nothing had come between
