"""Averages of the weights, by torch.optim.swa_utils, beside the training: exponential ones, and SWA with batch norm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from curveball_fused import CurveBall
from tests.helpers.training import SETTINGS, advance, assert_equal, everything, small


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("preconditioner", [None, "kronecker"])
def test_averages_are_those_of_the_weights_after_each_step_and_change_no_step(preconditioner: str | None) -> None:
    net, x, y = small()
    twin = copy.deepcopy(net)
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
    swa = AveragedModel(net)
    optimizer = CurveBall(net.parameters(), preconditioner=preconditioner)
    passed = []
    torch.manual_seed(1)
    for _ in range(6):
        advance(optimizer, net, x, y)
        for average in (ema, swa):
            average.update_parameters(net)
        ema.eval()(x)
        passed.append(weights(net))
    exponential = passed[0]
    for after in passed[1:]:
        exponential = [0.7 * a + 0.3 * b for a, b in zip(exponential, after, strict=True)]
    mean = [torch.stack(of_one).mean(0) for of_one in zip(*passed, strict=True)]
    for average, expected in ((ema, exponential), (swa, mean)):
        torch.testing.assert_close(weights(average.module), expected)
        assert all(p.grad is None for p in average.parameters())

    plain = CurveBall(twin.parameters(), preconditioner=preconditioner)
    torch.manual_seed(1)
    advance(plain, twin, x, y, 6)
    assert_equal(everything(optimizer, net), everything(plain, twin))


def test_swa_from_the_schedule_to_the_statistics_of_batch_norm() -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters(), **SETTINGS)
    schedule, swa = SWALR(optimizer, swa_lr=0.4, anneal_epochs=2), AveragedModel(net)
    for _ in range(4):
        advance(optimizer, net, x, y, 2)
        swa.update_parameters(net)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4)
    update_bn([(x,), (x,)], swa)
    norm = swa.module[1]
    assert norm.num_batches_tracked == 2
    torch.testing.assert_close(norm.running_mean, swa.module[0](x).mean(0))

    net.load_state_dict(swa.module.state_dict())  # and go on from the average
    before = [float(advance(optimizer, net, x, y)[0]) for _ in range(20)]
    assert before[-1] < before[0]
