"""Train with Accelerate: its optimizer hands the closure on; its checkpoints resume bit for bit.

pip install accelerate
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curveball_fused import CurveBall


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 5))


def make_data():
    """256 points of 20 numbers, whose class is the largest of 5 linear functions."""
    numbers = torch.Generator().manual_seed(1)
    x = torch.randn(256, 20, generator=numbers)
    return TensorDataset(x, (x @ torch.randn(20, 5, generator=numbers)).argmax(1))


def train(epochs, folder, resume=False):
    accelerator = Accelerator()  # mixed_precision="bf16" works as well
    model = make_model()
    optimizer = CurveBall(model.parameters(), preconditioner="kronecker")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=32)  # `lr` is a factor on the step
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, DataLoader(make_data(), batch_size=32), scheduler
    )
    if resume:
        accelerator.load_state(folder)  # weights, optimizer, scheduler, random numbers

    for epoch in epochs:
        for x, y in loader:
            optimizer.step(lambda: (model(x), lambda outputs: F.cross_entropy(outputs, y)))
            scheduler.step()
        # Accelerate drops what a step returns; the optimizer that it wraps knows the loss.
        loss = optimizer.optimizer.stats()["loss"]
        accelerator.print(f"epoch {epoch}: loss {float(loss):.4f}")

    accelerator.save_state(folder)
    return model


if __name__ == "__main__":
    train(range(2), "checkpoint")
    model = train(range(2, 4), "checkpoint", resume=True)  # as if nothing had come between
