"""The examples of trainers, as a user would paste them: each equals the plain loop bit for bit, over its checkpoint."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from curveball_fused import CurveBall
from tests.helpers.trainers import fresh_accelerate, required

EXAMPLES = Path(__file__).parents[2] / "examples" / "trainers"
EPOCHS, STEPS = 4, 8
Example = dict[str, Any]


def classifier(example: Example, schedule: str = "") -> nn.Module:
    """Train the example's model on its data in the loop of the README."""
    model = example["make_model"]()
    optimizer = CurveBall(model.parameters(), preconditioner="kronecker")
    scheduler = CosineAnnealingLR(optimizer, T_max=EPOCHS * STEPS if schedule == "steps" else EPOCHS)
    for _ in range(EPOCHS):
        for x, y in DataLoader(example["make_data"](), batch_size=32):
            optimizer.step(lambda: model(x), lambda outputs: F.cross_entropy(outputs, y))
            if schedule == "steps":
                scheduler.step()
        if schedule == "epochs":
            scheduler.step()
    return model


def language_model(example: Example) -> nn.Module:
    """Train the example's model on its data, next tokens by F.cross_entropy, in the order in which a Trainer draws."""
    transformers = required("transformers")
    model = example["make_model"]()
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments("unused", per_device_train_batch_size=16, report_to="none"),
        train_dataset=example["make_data"](),
    )  # which has drawn nothing yet, and set the seed
    loader = trainer.get_train_dataloader()
    decayed = trainer.get_decay_parameter_names(model)
    groups: list[list[torch.Tensor]] = [[], []]
    for name, p in model.named_parameters():
        groups[name not in decayed].append(p)
    optimizer = CurveBall([{"params": group} for group in groups], preconditioner="kronecker")
    model.train()
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        for batch in loader:
            tokens = batch["input_ids"]
            wanted = F.pad(tokens[:, 1:], (0, 1), value=-100)
            optimizer.step(
                lambda: model(input_ids=tokens).logits,
                lambda logits: F.cross_entropy(logits.view(-1, 32), wanted.flatten()),
            )
    return model


CASES: dict[str, tuple[list[str], Callable[[Example], nn.Module]]] = {
    "accelerate_loop": (["accelerate"], lambda example: classifier(example, "steps")),
    "fabric_loop": (["lightning"], classifier),
    "lightning_manual": (["lightning"], classifier),
    "lightning_automatic": (["lightning"], lambda example: classifier(example, "epochs")),
    "ignite_loop": (["ignite"], classifier),
    "huggingface_trainer": (["transformers", "accelerate"], language_model),
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with fresh_accelerate():
        yield


def test_every_example_is_tested() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(CASES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the examples would run on the GPU, the plain loop does not")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_loop_bit_for_bit(name: str, recwarn: pytest.WarningsRecorder) -> None:
    packages, plain = CASES[name]
    for package in packages:
        required(package)
    steps: list[Any] = []
    counting = register_optimizer_step_post_hook(lambda *arguments: steps.append(arguments[0]))
    try:
        example = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        counting.remove()
    assert len(steps) == EPOCHS * STEPS and steps[0] is not steps[-1]  # it went on, and did not begin again
    found = {key.removeprefix("_forward_module."): t for key, t in example["model"].state_dict().items()}
    assert not [w for w in recwarn if "curveball_fused" in str(w.message)]  # nothing has been followed by another way
    expected = plain(example).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
