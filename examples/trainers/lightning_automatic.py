"""Train with Lightning, automatic optimization: a mixin takes the step where Lightning would call backward().

pip install lightning
"""

from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curveball_fused import CurveBall
from curveball_fused.integrations.lightning import CurveBallMixin


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 5))


def make_data():
    """256 points of 20 numbers, whose class is the largest of 5 linear functions."""
    numbers = torch.Generator().manual_seed(1)
    x = torch.randn(256, 20, generator=numbers)
    return TensorDataset(x, (x @ torch.randn(20, 5, generator=numbers)).argmax(1))


class Classifier(CurveBallMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = make_model()

    def configure_optimizers(self):
        optimizer = CurveBall(self.net.parameters(), preconditioner="kronecker")
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)  # `lr` is a factor on the step
        return [optimizer], [scheduler]

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss, _ = self.curveball_step(lambda: self.net(x), lambda outputs: F.cross_entropy(outputs, y))
        self.log("loss", loss, prog_bar=True)
        return loss


def train(epochs, folder, resume=False):
    # precision="bf16-mixed" works as well
    trainer = L.Trainer(max_epochs=epochs, devices=1, default_root_dir=folder, logger=False)
    module, file = Classifier(), Path(folder) / "state.ckpt"
    trainer.fit(module, DataLoader(make_data(), batch_size=32), ckpt_path=file if resume else None)
    trainer.save_checkpoint(file)
    return module.net


if __name__ == "__main__":
    train(2, "checkpoint")
    model = train(4, "checkpoint", resume=True)  # the third and the fourth epoch, as if nothing had come between
