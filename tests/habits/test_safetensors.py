"""Checkpoints without pickle: tensors by name, and the options as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from curveball_fused import CurveBall
from tests.helpers.training import SETTINGS, advance, assert_equal, everything, small

safetensors_torch = pytest.importorskip("safetensors.torch")
safetensors = pytest.importorskip("safetensors")


# What docs/habits.md shows.
def save(file: Path, model: nn.Module, optimizer: CurveBall) -> None:
    saved = optimizer.state_dict()
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"optimizer.{i}.{name}": t for i, own in saved["state"].items() for name, t in own.items()}
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    safetensors_torch.save_file(tensors, file, metadata={"groups": json.dumps(saved["param_groups"])})


def load(file: Path, model: nn.Module, optimizer: CurveBall) -> None:
    with safetensors.safe_open(file, "pt") as opened:
        groups = json.loads(opened.metadata()["groups"])
    tensors = safetensors_torch.load_file(file)
    state: dict[int, dict[str, Any]] = {}
    for key in [key for key in tensors if key.startswith("optimizer.")]:
        _, i, name = key.split(".")
        state.setdefault(int(i), {})[name] = tensors.pop(key)
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


OPTIONS: list[dict[str, Any]] = [
    SETTINGS,
    dict(preconditioner="kronecker", solve_interval=2),
    dict(curvature="forward"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=["published", "kronecker", "forward"])
def test_resumes_bit_for_bit(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    net, x, y = small(dtype=dtype)
    optimizer = CurveBall(net.parameters(), **options)
    advance(optimizer, net, x, y, 3)
    optimizer.param_groups[0]["lr"] = 0.6  # as a scheduler would
    save(tmp_path / "checkpoint.safetensors", net, optimizer)
    twin, _, _ = small(1, dtype=dtype)
    other = CurveBall(twin.parameters(), preconditioner=options.get("preconditioner"))
    load(tmp_path / "checkpoint.safetensors", twin, other)
    assert other.param_groups[0]["lr"] == 0.6
    for o, model in ((optimizer, net), (other, twin)):
        torch.manual_seed(5)
        advance(o, model, x, y, 4)
    assert_equal(everything(optimizer, net), everything(other, twin))


def test_frozen_parameters_and_other_layouts(tmp_path: Path) -> None:
    def made(seed: int) -> tuple[nn.Module, CurveBall]:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)).to(memory_format=torch.channels_last)
        net[0].bias.requires_grad_(False)
        groups = [dict(params=net[0].parameters(), lr=0.5), dict(params=net[2].parameters(), weight_decay=1e-3)]
        return net, CurveBall(groups)

    x, y = torch.randn(5, 3, 4, 4), torch.arange(5) % 3
    (net, optimizer), (twin, other) = made(0), made(1)
    advance(optimizer, net, x, y, 2)
    save(tmp_path / "checkpoint.safetensors", net, optimizer)
    load(tmp_path / "checkpoint.safetensors", twin, other)
    for o, model in ((optimizer, net), (other, twin)):
        advance(o, model, x, y, 3)
    assert_equal(everything(optimizer, net), everything(other, twin))
