"""A small training by a trainer, in one process or in several: `python -m tests.helpers.trainer_processes NAME FILE`.

The data are the same, in batches of 16 over all processes, of which each has its own rows.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from curveball_fused import CurveBall

RANK, PROCESSES = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
EPOCHS, BATCH = 3, 16


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data() -> TensorDataset:
    numbers = torch.Generator().manual_seed(1)
    x = torch.randn(64, 5, generator=numbers).double()
    return TensorDataset(x, x[:, :3].argmax(1))


def accelerate() -> nn.Module:
    from accelerate import Accelerator

    model = net()
    model, optimizer, loader = Accelerator(cpu=True).prepare(
        model, CurveBall(model.parameters()), DataLoader(data(), batch_size=BATCH // PROCESSES)
    )
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.step(lambda: (model(x), lambda outputs: F.cross_entropy(outputs, y)))
    return model


def fabric() -> nn.Module:
    from lightning.fabric import Fabric

    trainer = Fabric(accelerator="cpu", devices=PROCESSES, strategy="ddp" if PROCESSES > 1 else "auto")
    trainer.launch()
    model = net()
    model, optimizer = trainer.setup(model, CurveBall(model.parameters()))
    for _ in range(EPOCHS):
        for x, y in trainer.setup_dataloaders(DataLoader(data(), batch_size=BATCH // PROCESSES)):
            optimizer.step(lambda: (model.module(x), lambda outputs: F.cross_entropy(outputs, y)))
    return model  # type: ignore[no-any-return]


def lightning() -> nn.Module:
    import lightning as L

    from curveball_fused.integrations.lightning import CurveBallMixin

    class Module(CurveBallMixin, L.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def configure_optimizers(self) -> Any:
            return CurveBall(self.net.parameters())

        def training_step(self, batch: Any, _: int) -> Any:
            x, y = batch
            return self.curveball_step(lambda: self.net(x), lambda outputs: F.cross_entropy(outputs, y))[0]

    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=PROCESSES,
        strategy="ddp" if PROCESSES > 1 else "auto",
        precision="64-true",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    order = DistributedSampler(data(), PROCESSES, RANK, shuffle=False)
    trainer.fit(module, DataLoader(data(), batch_size=BATCH // PROCESSES, sampler=order))
    return module.net


def huggingface() -> nn.Module:
    """With texts of different lengths, so that each process has a number of labels of its own."""
    import transformers

    from curveball_fused.integrations.huggingface import CurveBallTrainer

    texts = torch.randint(31, (32, 7), generator=torch.Generator().manual_seed(3))
    labels = texts.clone()
    for row, length in enumerate([2, 7, 5, 3, 7, 7, 6, 7] * 4):
        labels[row, length:] = -100
    torch.manual_seed(0)
    config = dict(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    config |= dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).double()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=8 // PROCESSES // 2,
            gradient_accumulation_steps=2,
            max_steps=4,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
        )
        rows = [dict(input_ids=x, labels=y) for x, y in zip(texts, labels)]
        CurveBallTrainer(
            model, arguments, train_dataset=rows, optimizers=(CurveBall(model.parameters(), lambd=3.0), None)
        ).train()
    return model  # type: ignore[no-any-return]


TRAINERS = {f.__name__: f for f in (accelerate, fabric, lightning, huggingface)}


def weights(name: str) -> Tensor:
    return torch.cat([p.detach().flatten() for p in TRAINERS[name]().parameters()])


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = weights(sys.argv[1])
    if RANK == 0:
        torch.save(found, sys.argv[2])
    if dist.is_initialized():  # else gloo's threads may still run as the process ends, which aborts it
        dist.barrier()
        dist.destroy_process_group()
