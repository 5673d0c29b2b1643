"""Gradient checkpointing as models of transformers switch it on: the steps are those without it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curveball_fused import CurveBall

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(14).view(2, 7) * 5 % 31


def made(name: str) -> nn.Module:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    if name == "GPT2":
        config = transformers.GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        net: nn.Module = transformers.GPT2LMHeadModel(config)  # with its dropout of 0.1
    else:
        config = transformers.LlamaConfig(
            vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
        )
        net = transformers.LlamaForCausalLM(config)
    return net.double().train()


def enable(net: nn.Module, **options: object) -> None:
    """Switch it on; newer versions have another name for it."""
    if hasattr(net, "activation_checkpointing_enable"):
        net.activation_checkpointing_enable(options or None)
    else:
        net.gradient_checkpointing_enable(options or None)


def losses(net: nn.Module, curvature: str, preconditioner: str | None = None) -> tuple[list[float], list[str]]:
    optimizer = CurveBall(net.parameters(), curvature=curvature, preconditioner=preconditioner)
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            torch.manual_seed(step)
            found.append(
                float(
                    optimizer.step(
                        lambda: net(input_ids=TOKENS).logits.flatten(0, 1),
                        lambda out: F.cross_entropy(out, TOKENS.roll(-1, 1).flatten()),
                    )[0]
                )
            )
    assert all(p.grad is None for p in net.parameters())
    return found, [str(w.message) for w in caught if "curveball_fused" in str(w.message)]


@pytest.mark.parametrize("preconditioner", [None, "kronecker"])
@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_models_of_transformers_take_the_steps_that_they_take_without(name: str, preconditioner: str | None) -> None:
    plain = made(name)
    checkpointed = copy.deepcopy(plain)
    enable(checkpointed)  # its default is what a step needs
    found, said = losses(checkpointed, "auto", preconditioner)
    # By the same method, as the tapes take other kernels, and with them other numbers for dropout.
    expected, _ = losses(plain, "forward", preconditioner)
    assert found == pytest.approx(expected, rel=1e-6)  # what the model computes in float32
    assert "gradient checkpointing" in said[-1] and "dual numbers are used" in said[-1]


def test_the_older_kind_is_refused_with_what_to_write() -> None:
    net = made("GPT2")
    enable(net, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        losses(net, "auto")
