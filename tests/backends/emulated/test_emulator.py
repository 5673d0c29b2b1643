"""The emulator that runs CUDA kernels on the CPU notices, or makes visible, what a GPU would not forgive."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.mark.parametrize(
    "mistake, message",
    {
        "leaves before barrier": "left the kernel while others wait at the barrier",
        "different barriers": "different barriers",
        "lane missing from shuffle": "waits in vain",
        "lane at barrier instead": "waits in vain",
        "lane outside its mask": "without being in its mask",
        "shared overrun": "past the end of dynamic shared memory",
        "too much shared": "raise_shared_limit",
    }.items(),
)
@pytest.mark.parametrize("seed", range(3))
def test_the_emulator_notices(device: Any, mistake: str, message: str, seed: int) -> None:
    device.set_seed(seed)
    with pytest.raises(RuntimeError, match=message):
        device.selftest(mistake)


def test_the_emulator_makes_visible(device: Any) -> None:
    unset = torch.tensor(device.selftest("reads unset shared"))
    assert unset[3].isnan() and unset.isnan().sum() == 1
    expected = [float(63 - i) for i in range(64)]
    results = []
    for seed in range(8):
        device.set_seed(seed)
        results.append(device.selftest("no barrier"))
    assert all(result != expected for result in results) and any(str(r) != str(results[0]) for r in results)


def test_the_emulators_shuffles(device: Any) -> None:
    for i, value in enumerate(device.selftest("shuffles")):
        lane, warp = i % 32, i // 32 * 32
        down = lane + 2 if lane + 2 < 32 else lane
        up = lane - 1 if lane % 8 else lane
        assert value == warp * 1010101 + (lane ^ 3) + 100 * down + 10**4 * up + 10**6 * (lane // 16 * 16 + 1)
