"""CurveBall in Lightning's automatic optimization.

There the optimizer's closure is Lightning's own: it calls backward() and returns the loss alone. So the training step
takes CurveBall's step itself, and what Lightning does around it does nothing. (Manual optimization needs none of this.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from curveball_fused.optimizer import CurveBall


class CurveBallMixin:
    """Give a `LightningModule` whose optimization is automatic the step of CurveBall; it comes first among the bases.

    `training_step` takes the step by `curveball_step` and returns the loss. All else is Lightning's: schedulers,
    logging, checkpoints, callbacks, precision "bf16-mixed" and "16-mixed" (whose loss scale is CurveBall's own).
    `on_before_optimizer_step`, which is there to look at gradients, is not called.

    Example::

        class Classifier(CurveBallMixin, L.LightningModule):
            def configure_optimizers(self):
                return CurveBall(self.parameters(), preconditioner="kronecker")

            def training_step(self, batch, batch_idx):
                x, y = batch
                loss, outputs = self.curveball_step(lambda: self(x), lambda outputs: F.cross_entropy(outputs, y))
                self.log("loss", loss)
                return loss
    """

    def curveball_step(self, model_fn: Any, loss_fn: Callable[[Any], Tensor] | None = None, **options: Any) -> Any:
        """Take one step; to be called once in `training_step`.

        Args:
            model_fn: as of `CurveBall.step`: called without arguments, returns the predictions; or a list of the
                batch's parts.
            loss_fn: called with the predictions, returns the scalar loss; None with a list.
            options: others of `CurveBall.step`, such as `weights`.

        Returns:
            The loss (0-dim) and the predictions at the weights before the step, both detached.

        Raises:
            TypeError: the module has another optimizer than one `CurveBall`, or the mixin is not its first base.
            ValueError: the Lightning trainer accumulates or clips gradients, of which there are none.

        Example::

            loss, outputs = self.curveball_step(lambda: self(x), lambda outputs: F.mse_loss(outputs, y))
        """
        module: Any = self  # which is a LightningModule, too
        optimizer = module.optimizers(use_pl_optimizer=False)
        if not isinstance(optimizer, CurveBall):
            raise TypeError(
                "CurveBallMixin serves one optimizer, a CurveBall: let configure_optimizers return it; got "
                f"{type(optimizer).__name__}. For several optimizers use manual optimization."
            )
        bases = type(self).__mro__
        if any(base.__name__ == "LightningModule" for base in bases[: bases.index(CurveBallMixin)]):
            raise TypeError(
                f"CurveBallMixin comes first among the bases: class {type(self).__name__}(CurveBallMixin, "
                "L.LightningModule)."
            )
        if module.trainer.accumulate_grad_batches > 1:
            raise ValueError(
                "accumulate_grad_batches cannot be used with CurveBall, which leaves no gradients to add up: make the "
                "batches of the DataLoader larger instead, and give curveball_step a list of parts of one if memory is "
                "short: [(model_fn, loss_fn), ...]."
            )
        if module.trainer.gradient_clip_val:
            raise ValueError(
                "gradient_clip_val has no effect with CurveBall, which leaves nothing in .grad and sets the length of "
                "its steps itself: leave it out."
            )
        self._has_stepped = True
        return optimizer.step(model_fn, loss_fn, **options)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Run `training_step`, which takes the step, where Lightning would let the optimizer do so.

        Raises:
            RuntimeError: it has taken none, and has returned a loss, as is done for a step by backward().
        """
        self._has_stepped = False
        loss = optimizer_closure()
        if loss is not None and not self._has_stepped:
            raise RuntimeError(
                "training_step has returned a loss without a step: call self.curveball_step(model_fn, loss_fn) in it. "
                "(To pass over a batch return None.)"
            )

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the step has been taken."""
