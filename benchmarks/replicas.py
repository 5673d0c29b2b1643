"""One process of several that train a replica each, timed: what `test_data_parallel.py` starts.

    python -m benchmarks.replicas <case> <method> <processes>

Starts the processes, each with one thread and its share of the batch, and prints JSON: seconds a step of each turn, and
the bytes that a process has sent in the last step.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.nets import CASES
from curveball_fused import CurveBall

TURNS, TURN, WARM_UP = 5, 20, 12


def worker(rank: int, case: str, method: str, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", rank=rank, world_size=processes, init_method=meet)
    net, x, y = CASES[case].make()
    x, y = x.chunk(processes)[rank], y.chunk(processes)[rank]
    model = DistributedDataParallel(net)
    if method == "AdamW":
        first_order = torch.optim.AdamW(net.parameters(), fused=True)

        def step() -> None:
            first_order.zero_grad()
            F.cross_entropy(model(x), y).backward()
            first_order.step()
    else:
        optimizer = CurveBall(net.parameters(), preconditioner=None if method == "published" else method)

        def step() -> None:
            optimizer.step(partial(model, x), partial(F.cross_entropy, target=y))

    seconds = []
    for turn in range(TURNS + 1):
        dist.barrier()
        began = time.perf_counter()
        for _ in range(TURN if turn else WARM_UP):
            step()
        dist.barrier()
        seconds.append((time.perf_counter() - began) / TURN)
    if rank == 0:
        sent = None if method == "AdamW" else int(optimizer.stats()["sent_bytes"])
        Path(folder, "result").write_text(json.dumps({"seconds": seconds[1:], "sent": sent}))
    dist.destroy_process_group()


def main() -> None:
    case, method, processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (case, method, processes, folder), nprocs=processes)
        found = json.loads(Path(folder, "result").read_text())
    print(json.dumps(found | {"median": statistics.median(found["seconds"])}))


if __name__ == "__main__":
    main()
