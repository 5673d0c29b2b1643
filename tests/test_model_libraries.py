"""Models of libraries, small and with random weights: five steps by the tapes equal those by double backward.

The two have no derivative in common: tapes push tangents through the run, double backward knows autograd alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall

STEPS = 5
TOKENS = torch.arange(14).view(2, 7) * 5 % 31
SIZES = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
UNDROPPED = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
PRECISE = 1e-9
# Of what is computed in float32 whatever the model's dtype: the softmax of "eager" attention, and the factor 1/6 in
# torch's derivative of the hard sigmoid.
ROUNDED = 1e-6


def signal(*shape: int) -> Tensor:
    """Return inputs that are no two alike."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).mul(97).sin().view(shape)


def losses(net: nn.Module, run: Callable[[nn.Module], Tensor], curvature: str) -> tuple[list[float], list[str]]:
    """Take a few steps; return their losses, and what was announced."""
    optimizer = CurveBall(net.parameters(), curvature=curvature, lambd=2.0, lambda_interval=2, weight_decay=0.01)

    def loss_fn(outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs, torch.arange(len(outputs)) % outputs.shape[1])

    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            torch.manual_seed(step)  # stochastic depth draws
            found.append(float(optimizer.step(lambda: run(net), loss_fn)[0]))
    return found, [text for text in (str(w.message) for w in caught) if "curveball_fused" in text]


def check(net: nn.Module, run: Callable[[nn.Module], Tensor], tolerance: float, fallback: str = "") -> None:
    """Compare the steps by both methods; `fallback` is in the announcement of the way that "auto" took, if any."""
    other = copy.deepcopy(net)
    found, said = losses(net, run, "auto")
    expected, _ = losses(other, run, "double_backward")
    assert found == pytest.approx(expected, rel=tolerance)
    assert len(set(found)) == STEPS
    for (name, ours), theirs in zip(net.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=100 * tolerance, atol=tolerance, msg=name)
    assert bool(said) == bool(fallback) and all(fallback in text for text in said)


def next_token(net: nn.Module) -> Tensor:
    logits: Tensor = net(input_ids=TOKENS).logits
    return logits.flatten(0, 1)


def translation(net: nn.Module) -> Tensor:
    logits: Tensor = net(input_ids=TOKENS, decoder_input_ids=TOKENS.flip(1)).logits
    return logits.flatten(0, 1)


def transcription(net: nn.Module) -> Tensor:
    logits: Tensor = net(input_features=signal(2, 4, 16), decoder_input_ids=TOKENS).logits
    return logits.flatten(0, 1)


def image_classes(net: nn.Module) -> Tensor:
    logits: Tensor = net(pixel_values=signal(4, 3, 8, 8)).logits
    return logits


class Family(NamedTuple):
    """A family of models in transformers: what makes it, its configuration, how it is run."""

    task: str
    options: dict[str, Any]
    run: Callable[[nn.Module], Tensor] = next_token


FAMILIES = {
    "GPT2": Family(
        "CausalLM",
        dict(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    ),
    "Llama": Family("CausalLM", SIZES | dict(num_key_value_heads=2)),
    "Qwen3": Family("CausalLM", SIZES | dict(num_key_value_heads=2, head_dim=4)),
    "Bert": Family("MaskedLM", SIZES | UNDROPPED),
    "T5": Family(
        "Seq2SeqLM",
        dict(vocab_size=31, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0),
        translation,
    ),
    "ViT": Family("ImageClassification", SIZES | UNDROPPED | dict(image_size=8, patch_size=4), image_classes),
    "Whisper": Family(
        "SpeechSeq2Seq",
        dict(
            vocab_size=31, num_mel_bins=4, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=8,
            max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            dropout=0,
        ),
        transcription,
    ),
    "Mamba": Family("CausalLM", dict(vocab_size=31, hidden_size=16, state_size=4, num_hidden_layers=2)),
}  # fmt: skip


def of_transformers(name: str, attention: str | None = None) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**family.options)
    chosen = {} if attention is None else {"attn_implementation": attention}
    net: nn.Module = getattr(transformers, f"AutoModelFor{family.task}").from_config(config, **chosen)
    return net.double()


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "Mamba"])
def test_transformers(name: str, attention: str) -> None:
    net = of_transformers(name, attention).train(attention == "eager")  # of which none drops anything
    check(net, FAMILIES[name].run, ROUNDED if attention == "eager" else PRECISE)


@pytest.mark.slow
@pytest.mark.parametrize("trains", [True, False], ids=["train", "eval"])
def test_mamba(trains: bool) -> None:
    """It writes to the cache that it keeps in eval mode, and computes its recurrence in float32 in either."""
    check(of_transformers("Mamba").train(trains), next_token, ROUNDED, "" if trains else "operators are followed")


class Architecture(NamedTuple):
    """A model of timm.models, its options, the width of its images, and how closely methods agree on it."""

    name: str
    options: dict[str, Any]
    width: int = 32
    tolerance: float = PRECISE


WINDOWS = dict(img_size=32, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 2))
DENSE = dict(growth_rate=4, block_config=(2, 2, 2, 2))
ARCHITECTURES = {
    "ResNet": Architecture("resnet10t", dict(channels=(8, 8, 16, 16))),
    "ConvNeXt": Architecture("convnext_atto", dict(depths=(1, 1, 2, 1), dims=(8, 8, 16, 16))),
    "EfficientNet": Architecture("test_efficientnet", {}),
    "MobileNetV3": Architecture("mobilenetv3_small_050", {}, 64, ROUNDED),
    "Swin": Architecture("swin_tiny_patch4_window7_224", WINDOWS),
    "Swin V2": Architecture("swinv2_tiny_window8_256", WINDOWS),
    "MLP-Mixer": Architecture("MlpMixer", dict(img_size=32, patch_size=8, num_blocks=2, embed_dim=16)),
    "DenseNet": Architecture("densenet121", DENSE),
    "NFNet": Architecture("test_nfnet", {}),
}


def of_timm(architecture: Architecture) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net: nn.Module = getattr(timm.models, architecture.name)(num_classes=5, **architecture.options)
    images = signal(4, 3, architecture.width, architecture.width)
    return net.double(), lambda net: net(images)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("trains", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_timm(name: str, trains: bool) -> None:
    architecture = ARCHITECTURES[name]
    net, run = of_timm(architecture)
    check(net.train(trains), run, architecture.tolerance)


@pytest.mark.slow
def test_timm_with_checkpoints() -> None:
    net, run = of_timm(Architecture("densenet121", DENSE | dict(memory_efficient=True)))
    check(net.train(), run, PRECISE, "dual numbers are used")
