"""Lightning: manual optimization hands the closure on; CurveBallMixin takes the step in automatic optimization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused import CurveBall
from curveball_fused.integrations.lightning import CurveBallMixin
from tests.helpers.trainers import batches, net, numbers_of, plain_loop, required

L = required("lightning")
PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Module(L.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def configure_optimizers(self) -> Any:
        return CurveBall(self.net.parameters())


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, _: int) -> None:
        x, y = batch
        loss, outputs = self.optimizers().step(lambda: (self.net(x), lambda outputs: F.cross_entropy(outputs, y)))
        assert outputs.shape == (16, 3)
        self.log("loss", loss, on_epoch=True)


class Automatic(CurveBallMixin, Module):
    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        loss, outputs = self.curveball_step(lambda: self.net(x), lambda outputs: F.cross_entropy(outputs, y))
        assert outputs.shape == (16, 3)
        self.log("loss", loss, on_epoch=True)
        return loss


class WithAdam(Automatic):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters())


class Classical(Module):
    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class WithoutStep(CurveBallMixin, Classical):
    pass


class MixinLast(Module, CurveBallMixin):
    def training_step(self, batch: Any, _: int) -> Tensor:
        loss: Tensor = self.curveball_step(lambda: self.net(batch[0]), lambda o: F.cross_entropy(o, batch[1]))[0]
        return loss


class OnlySecondBatches(Automatic):
    def training_step(self, batch: Any, i: int) -> Any:
        return super().training_step(batch, i) if i % 2 else None


def fit(module: Any, folder: Path, precision: str = "32-true", **options: Any) -> Any:
    if precision == "16-mixed":  # which it has for GPUs only
        half = required("lightning.pytorch.plugins.precision").MixedPrecision(precision, "cpu")
        options["plugins"] = [half]
    else:
        options["precision"] = precision
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, batches())
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_manual_optimization(precision: str, tmp_path: Path) -> None:
    module = Manual()
    trainer = fit(module, tmp_path, precision)
    assert trainer.global_step == 12 and 0 < trainer.callback_metrics["loss_epoch"] < 1.5
    assert torch.equal(numbers_of(module.net), plain_loop(PRECISIONS[precision]))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_automatic_optimization(precision: str, tmp_path: Path) -> None:
    module = Automatic()
    trainer = fit(module, tmp_path, precision)
    assert trainer.global_step == 12 and 0 < trainer.callback_metrics["loss_epoch"] < 1.5
    assert torch.equal(numbers_of(module.net), plain_loop(PRECISIONS[precision]))
    assert all(p.grad is None for p in module.parameters())


class InParts(Automatic):
    def training_step(self, batch: Any, _: int) -> Tensor:
        parts = [
            (lambda x=x: self.net(x), lambda outputs, y=y: F.cross_entropy(outputs, y))
            for x, y in zip(*(t.split(10) for t in batch))
        ]
        loss, outputs = self.curveball_step(parts)
        assert [len(out) for out in outputs] == [10, 6]
        return loss


def test_a_batch_in_parts(tmp_path: Path) -> None:
    trainer = fit(InParts(), tmp_path)
    assert trainer.global_step == 12 and trainer.lightning_module.optimizers().stats()["loss"] < 1.0


def test_a_batch_may_be_passed_over(tmp_path: Path) -> None:
    trainer = fit(OnlySecondBatches(), tmp_path)
    assert len(trainer.lightning_module.optimizers().history()["step"]) == 6


REFUSED: dict[str, tuple[type, dict[str, Any], type[Exception], str]] = {
    "accumulation": (Automatic, dict(accumulate_grad_batches=2), ValueError, "batches of the DataLoader larger"),
    "clipping": (Automatic, dict(gradient_clip_val=1.0), ValueError, "gradient_clip_val has no effect"),
    "another optimizer": (WithAdam, {}, TypeError, "got Adam"),
    "no mixin": (Classical, {}, TypeError, "let it return both and leave out backward"),
    "a mixin that comes last": (MixinLast, {}, TypeError, "comes first among the bases"),
    "no step": (WithoutStep, {}, RuntimeError, "returned a loss without a step"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    kind, options, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        fit(kind(), tmp_path, **options)
