"""Train with PyTorch Ignite: the process function takes the step, and its checkpoints keep the optimizer.

pip install pytorch-ignite
"""

import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
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
    model = make_model()
    optimizer = CurveBall(model.parameters(), preconditioner="kronecker")

    def process(engine, batch):
        x, y = batch
        loss, _ = optimizer.step(lambda: model(x), lambda outputs: F.cross_entropy(outputs, y))
        return loss  # as engine.state.output

    trainer = Engine(process)

    @trainer.on(Events.EPOCH_COMPLETED)
    def report(engine):
        print(f"epoch {engine.state.epoch}: loss {float(engine.state.output):.4f}")

    parts = {"trainer": trainer, "model": model, "optimizer": optimizer}
    keep = Checkpoint(parts, DiskSaver(folder, create_dir=True, require_empty=False), filename_pattern="state.pt")
    trainer.add_event_handler(Events.COMPLETED, keep)
    if resume:
        Checkpoint.load_objects(parts, f"{folder}/state.pt")

    trainer.run(DataLoader(make_data(), batch_size=32), max_epochs=epochs)
    return model


if __name__ == "__main__":
    train(2, "checkpoint")
    model = train(4, "checkpoint", resume=True)  # the third and the fourth epoch, as if nothing had come between
