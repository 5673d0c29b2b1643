"""Train in several processes, each on its part of every batch; save, and resume with any number of processes.

torchrun --nproc-per-node 2 examples/data_parallel.py --checkpoint checkpoint.pt
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from curveball_fused import CurveBall


def save(path: Path, **contents: object) -> None:
    """Write beside it, then put in place: whoever reads finds the old checkpoint or the new one, whatever happens."""
    beside = path.with_suffix(".new")
    with beside.open("wb") as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())  # or a loss of power could leave a name without its contents
    os.replace(beside, path)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--checkpoint", type=Path)
    arguments.add_argument("--epochs", type=int, default=6)
    options = arguments.parse_args()

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)

    torch.manual_seed(0)
    inputs = torch.randn(1000, 20)
    data = TensorDataset(inputs, inputs[:, :4].argmax(dim=1))
    model = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 4)).to(device)
    wrapped = DistributedDataParallel(model)
    optimizer = CurveBall(model.parameters(), preconditioner="kronecker")

    first = 0
    if options.checkpoint is not None and options.checkpoint.exists():  # in every process
        saved = torch.load(options.checkpoint, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]

    # Of a batch of 200 each process takes its share.
    sampler = DistributedSampler(data, processes, rank)
    loader = DataLoader(data, batch_size=200 // processes, sampler=sampler)
    for epoch in range(first, options.epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            loss, _ = optimizer.step(lambda: wrapped(x), lambda outputs: F.cross_entropy(outputs, y))  # noqa: B023
        if rank == 0:
            print(f"epoch {epoch}: loss {loss:.4f}, of all {processes} processes", flush=True)
            if options.checkpoint is not None:
                save(
                    options.checkpoint, model=model.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch + 1
                )  # fmt: skip
    optimizer.check_replicas()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
