"""LoRA by peft, on a small Llama with random weights: the base is frozen, the adapter is trained, merged and saved."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from tests.helpers.trainers import required
from tests.helpers.training import assert_equal

transformers = pytest.importorskip("transformers")
peft = required("peft")

TOKENS = torch.arange(28).view(4, 7) * 5 % 31
NEXT = TOKENS.roll(-1, 1).flatten()


def base() -> nn.Module:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    net: nn.Module = transformers.LlamaForCausalLM(config).double()
    return net


def adapted(**options: Any) -> nn.Module:
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net: nn.Module = peft.get_peft_model(base(), config, autocast_adapter_dtype=False)
    return net.double()


def logits(net: nn.Module) -> Tensor:
    found: Tensor = net(input_ids=TOKENS).logits
    return found.flatten(0, 1)


def train(net: nn.Module, optimizer: CurveBall, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        losses.append(float(optimizer.step(lambda: logits(net), lambda out: F.cross_entropy(out, NEXT))[0]))
    return losses


def frozen(net: nn.Module) -> list[Tensor]:
    return [p.detach() for p in net.parameters() if not p.requires_grad]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": dict(lora_dropout=0.2),
    "dora": dict(use_dora=True),
    "with a trained head": dict(modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_are_those_by_double_backward_and_leave_the_base_alone(name: str) -> None:
    net = adapted(**VARIANTS[name]).train()
    twin, before = copy.deepcopy(net), copy.deepcopy(frozen(net))
    optimizer = CurveBall(net.parameters(), lambd=2.0, lambda_interval=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="curveball_fused")
        found = train(net, optimizer, 5)
    expected = train(twin, CurveBall(twin.parameters(), curvature="double_backward", lambd=2.0, lambda_interval=2), 5)
    assert found == pytest.approx(expected, rel=1e-6)  # RMS norm and rotation compute in float32
    assert found[-1] < found[0]
    assert_equal(frozen(net), before)
    assert all(p.grad is None for p in net.parameters())
    assert len(optimizer.state) == sum(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("preconditioner", [None, "kronecker"])
def test_an_adapter_is_merged_and_saved_and_resumes(tmp_path: Path, preconditioner: str | None) -> None:
    net = adapted()
    optimizer = CurveBall([p for p in net.parameters() if p.requires_grad], preconditioner=preconditioner)
    losses = train(net, optimizer, 8)
    assert losses[-1] < losses[0]
    net.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    again = peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True, autocast_adapter_dtype=False).double()
    resumed = CurveBall([p for p in again.parameters() if p.requires_grad], preconditioner=preconditioner)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert train(again, resumed, 3) == train(net, optimizer, 3)
    assert_equal([*net.state_dict().values()], [*again.state_dict().values()])

    outputs = logits(net.eval()).detach()
    torch.testing.assert_close(logits(net.merge_and_unload()), outputs)
