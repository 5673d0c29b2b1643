"""CurveBallTrainer: losses of the models of transformers, options that it has or refuses, precision."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from tests.helpers.tiers import slow
from tests.helpers.trainers import fresh_accelerate, required

transformers, accelerate = required("transformers"), required("accelerate")
from curveball_fused.integrations.huggingface import CurveBallTrainer  # noqa: E402

SIZES = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
GPT2 = dict(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2)
DROPLESS = GPT2 | dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
TOKENS = torch.randint(31, (32, 7), generator=torch.Generator().manual_seed(3))
MASKED = TOKENS.clone().index_fill_(1, torch.tensor([0, 2, 4]), -100)
SIGNAL = torch.randn(32, 4, 16, generator=torch.Generator().manual_seed(4))
BATCH = 8
Rows = list[dict[str, Tensor]]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    transformers.logging.set_verbosity_error()
    with fresh_accelerate():
        yield


def rows(**columns: Tensor) -> Rows:
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def arguments(**options: Any) -> Any:
    defaults = dict(
        output_dir="out",
        per_device_train_batch_size=BATCH,
        max_steps=6,
        logging_steps=2,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
    )
    return transformers.TrainingArguments(**defaults | options)


def gpt2(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**DROPLESS | options))


CAUSAL = rows(input_ids=TOKENS, labels=TOKENS)


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def aligned(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(logits.squeeze(), labels.squeeze())


def models(family: str, **options: Any) -> Callable[[], Any]:
    name, task = family.split(".")

    def make() -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SIZES | options)
        return getattr(transformers, name + task)(config)

    return make


T5 = dict(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0)
WHISPER = dict(
    num_mel_bins=4, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=8,
    max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
Loss = Callable[[Tensor, Tensor], Tensor]
KNOWN: dict[str, tuple[Callable[[], Any], Rows, Loss]] = {
    "GPT2": (gpt2, CAUSAL, next_token),
    "Llama": (models("Llama.ForCausalLM", num_key_value_heads=2), CAUSAL, next_token),
    "masked": (models("Bert.ForMaskedLM"), rows(input_ids=TOKENS, labels=MASKED), aligned),
    "classes": (
        models("Bert.ForSequenceClassification", num_labels=3),
        rows(input_ids=TOKENS, labels=TOKENS[:, 0] % 3),
        aligned,
    ),
    "regression": (
        models("Bert.ForSequenceClassification", num_labels=1),
        rows(input_ids=TOKENS, labels=TOKENS[:, 0] / 31.0),
        squared,
    ),
    "several classes": (
        models("Bert.ForSequenceClassification", num_labels=3, problem_type="multi_label_classification"),
        rows(input_ids=TOKENS, labels=(TOKENS[:, :3] % 2).float()),
        F.binary_cross_entropy_with_logits,
    ),
    "tokens": (models("Bert.ForTokenClassification", num_labels=31), rows(input_ids=TOKENS, labels=MASKED), aligned),
    "T5": (models("T5.ForConditionalGeneration", **T5), rows(input_ids=TOKENS, labels=MASKED), aligned),
    "Whisper": (
        models("Whisper.ForConditionalGeneration", **WHISPER),
        rows(input_features=SIGNAL, labels=TOKENS),
        aligned,
    ),
    "images": (
        models("ViT.ForImageClassification", image_size=8, patch_size=4, num_labels=5),
        rows(pixel_values=SIGNAL[:, :3].reshape(32, 3, 4, 4).repeat(1, 1, 2, 2), labels=TOKENS[:, 0] % 5),
        aligned,
    ),
}
SLOW = ("Llama", "several classes", "tokens", "Whisper", "images")


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", [slow(name) if name in SLOW else name for name in KNOWN])
def test_loss_of_a_model_of_transformers(name: str) -> None:
    """The first one, of the first batch at the first weights, in whatever order and form the model has its labels."""
    make, data, loss_fn = KNOWN[name]
    model = make()
    other = make()
    for module in (*model.modules(), *other.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = {key: torch.stack([row[key] for row in data[:BATCH]]) for key in data[0]}
    with torch.no_grad():
        expected = float(loss_fn(other.eval()(**batch).logits, batch["labels"]))
    trainer = CurveBallTrainer(model, arguments(max_steps=4, logging_steps=1), train_dataset=data)
    trainer.train()
    found = losses(trainer)
    assert found[0] == pytest.approx(expected, rel=1e-5) and len(set(found)) == 4
    assert trainer._curveball().stats()["skipped_steps"] == 0
    assert all("grad_norm" not in entry for entry in trainer.state.log_history)
    assert all(p.grad is None for p in model.parameters())


def question_answering() -> Rows:
    return rows(input_ids=TOKENS, start_positions=TOKENS[:, 0] % 7, end_positions=TOKENS[:, 1] % 7)


EXPERTS = dict(num_key_value_heads=2, num_local_experts=4, output_router_logits=True)
UNKNOWN: dict[str, tuple[Callable[[], Any], Rows, str]] = {
    "other labels": (models("Bert.ForQuestionAnswering"), question_answering(), "no known loss of BertForQuestion"),
    "an auxiliary loss": (models("Mixtral.ForCausalLM", **EXPERTS), CAUSAL, "returns a loss of 3.4"),
    "no name that tells": (
        models("Bert.ForMultipleChoice"),
        rows(input_ids=TOKENS.view(16, 2, 7), labels=TOKENS[:16, 0] % 2),
        "that of its class is",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_loss_that_is_not_known_is_told(name: str) -> None:
    make, data, words = UNKNOWN[name]
    trainer = CurveBallTrainer(make(), arguments(), train_dataset=data)
    with pytest.raises(ValueError, match=words) as caught:
        trainer.train()
    assert "compute_loss_func=" in str(caught.value) and "model_and_loss" in str(caught.value)


def plain(model: Any, **options: Any) -> nn.Module:
    """Six steps in the order of the rows, by a loop of one's own."""
    optimizer = CurveBall(model.parameters(), **options)
    for i in range(6):
        x = TOKENS[i * BATCH % 32 :][:BATCH]
        optimizer.step(lambda: model(input_ids=x).logits, lambda logits: next_token(logits, x))
    return model


def weights(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Overridden(CurveBallTrainer):  # type: ignore[misc]
    def model_and_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        labels = inputs.pop("labels")
        return lambda: model(**inputs).logits, lambda logits: next_token(logits, labels)


@pytest.mark.parametrize("kind", ["compute_loss_func", "counted", "model_and_loss"])
def test_a_loss_of_ones_own(kind: str) -> None:
    trainer_class, options = CurveBallTrainer, {}
    if kind == "model_and_loss":
        trainer_class = Overridden
    elif kind == "counted":  # by the Trainer
        options["compute_loss_func"] = lambda out, labels, num_items_in_batch: (
            F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            / num_items_in_batch
        )
    else:
        options["compute_loss_func"] = lambda out, labels, **_: next_token(out.logits, labels)
    model = gpt2()
    optimizer = CurveBall(model.parameters(), lambd=3.0)
    trainer = trainer_class(
        model, arguments(), train_dataset=CAUSAL, eval_dataset=CAUSAL, optimizers=(optimizer, None), **options
    )
    trainer.train()
    if kind == "counted":
        torch.testing.assert_close(weights(model), weights(plain(gpt2(), lambd=3.0)), rtol=1e-3, atol=1e-5)
    else:
        assert torch.equal(weights(model), weights(plain(gpt2(), lambd=3.0)))
    assert trainer.evaluate()["eval_loss"] < 3.45


PADDED = TOKENS.clone()
for row, length in enumerate([2, 7, 5, 3] * 8):  # so that batches have different numbers of labels
    PADDED[row, length:] = -100
OWN = dict(compute_loss_func=lambda out, labels, **_: next_token(out.logits, labels))
SUMMED = dict(
    compute_loss_func=lambda out, labels, num_items_in_batch: (
        F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch
    )
)


@pytest.mark.parametrize("given", [{}, OWN, SUMMED], ids=["known", "mean", "sum"])
def test_accumulation_is_one_batch_in_parts(given: dict[str, Any]) -> None:
    """Three batches of three make a step, and of the last two of an epoch."""
    data, found = rows(input_ids=TOKENS[:24], labels=PADDED[:24]), []
    for size, steps in ((3, 3), (9, 1)):
        model = gpt2().double()
        trainer = CurveBallTrainer(
            model,
            arguments(per_device_train_batch_size=size, gradient_accumulation_steps=steps, logging_steps=1),
            train_dataset=data,
            optimizers=(CurveBall(model.parameters(), lambd=3.0), None),
            **given,
        )
        trainer.train()
        assert trainer._curveball().stats()["skipped_steps"] == 0
        found.append((weights(model), torch.tensor(losses(trainer))))
    torch.testing.assert_close(*[w for w, _ in found], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*[loss for _, loss in found], rtol=1e-5, atol=0)


def test_options_of_the_optimizer() -> None:
    """As to any Trainer, with the parameters that do not decay in a group of their own."""
    model = gpt2()
    given = dict(optimizer_cls_and_kwargs=(CurveBall, {"lambd": 7.0}))
    trainer = CurveBallTrainer(model, arguments(weight_decay=0.1), train_dataset=CAUSAL, **given)
    optimizer = trainer.create_optimizer()
    assert optimizer.defaults["lambd"] == 7.0 and optimizer.defaults["preconditioner"] is None
    assert [group["weight_decay"] for group in optimizer.param_groups] == [pytest.approx(5e-6), 0.0]
    assert all(p.dim() == 2 for p in optimizer.param_groups[0]["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len([*model.parameters()])


def test_the_scheduler_is_a_factor_on_the_step() -> None:
    found = []
    for kind in ("constant", "linear"):
        model = gpt2()
        trainer = CurveBallTrainer(model, arguments(lr_scheduler_type=kind), train_dataset=CAUSAL)
        trainer.train()
        found.append([entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry])
    assert found == [[1.0] * 3, pytest.approx([5 / 6, 3 / 6, 1 / 6])]


def test_options_without_effect_are_told() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CurveBallTrainer(gpt2(), arguments(), train_dataset=CAUSAL)
        CurveBallTrainer(gpt2(), arguments(max_grad_norm=0.0), train_dataset=CAUSAL)
    with pytest.warns(UserWarning, match=r"learning_rate=0.001 has no effect.*factor") as seen:
        CurveBallTrainer(gpt2(), arguments(learning_rate=1e-3, max_grad_norm=0.5), train_dataset=CAUSAL)
    assert any("max_grad_norm=0.5 has no effect" in str(w.message) for w in seen)


class OldWay(CurveBallTrainer):  # type: ignore[misc]
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs)


REFUSED: dict[str, tuple[type, dict[str, Any], type[Exception], str]] = {
    "smoothing": (CurveBallTrainer, dict(label_smoothing_factor=0.1), ValueError, "compute_loss_func"),
    "compute_loss": (OldWay, {}, TypeError, "model_and_loss"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str) -> None:
    kind, options, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        kind(gpt2(), arguments(**options), train_dataset=CAUSAL)


def test_another_optimizer_is_refused() -> None:
    model = gpt2()
    adam = torch.optim.Adam(model.parameters())
    trainer = CurveBallTrainer(model, arguments(), train_dataset=CAUSAL, optimizers=(adam, None))
    with pytest.raises(TypeError, match="got Adam"):
        trainer.train()


def in_autocast(model: Any, dtype: torch.dtype) -> Any:
    run = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype):
            return run(*args, **kwargs)

    model.forward = forward
    return model


@pytest.mark.parametrize("fails", [False, True])
def test_another_loop_of_accelerate_trains_afterwards(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Trainer has told Accelerate, so that its own loop takes no second step, does not stay."""
    from accelerate import Accelerator

    trainer = CurveBallTrainer(gpt2(), arguments(), train_dataset=CAUSAL)
    if fails:
        monkeypatch.setattr(trainer, "log", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    else:
        trainer.train()
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    model, optimizer = Accelerator(cpu=True).prepare(model, CurveBall(model.parameters()))
    optimizer.step(lambda: (model(torch.ones(3, 2)), lambda outputs: outputs.square().mean()))
    assert not torch.equal(before, model.weight)


def test_bfloat16() -> None:
    model = gpt2()
    optimizer = CurveBall(model.parameters())
    CurveBallTrainer(model, arguments(bf16=True), train_dataset=CAUSAL, optimizers=(optimizer, None)).train()
    assert torch.equal(weights(model), weights(plain(in_autocast(gpt2(), torch.bfloat16))))
    assert not torch.equal(weights(model), weights(plain(gpt2())))


class OnAGpu(CurveBallTrainer):  # type: ignore[misc]
    """What fp16=True makes of Accelerate on a GPU."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp, self.accelerator.scaler = True, torch.amp.GradScaler("cpu")
        accelerate.state.AcceleratorState._shared_state["_mixed_precision"] = "fp16"


def test_float16_has_the_loss_scale_of_curveball() -> None:
    model = gpt2()
    optimizer = CurveBall(model.parameters())
    trainer = OnAGpu(model, arguments(), train_dataset=CAUSAL, optimizers=(optimizer, None))
    trainer.train()
    assert trainer.accelerator.mixed_precision == "fp16" and trainer.optimizer.scaler is not None
    assert torch.equal(weights(model), weights(plain(in_autocast(gpt2(), torch.float16))))
    assert trainer._curveball().stats()["skipped_steps"] == 0


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "curveball_fused.integrations.huggingface"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="pip install transformers accelerate"):
        importlib.import_module(name)
