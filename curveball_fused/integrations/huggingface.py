"""CurveBall in Hugging Face's Trainer, which calls backward() itself and whose optimizer sees no closure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from curveball_fused.optimizer import CurveBall
from curveball_fused.user_warnings import warn_user

try:
    import accelerate  # noqa: F401 (which the Trainer needs)
    from transformers import Trainer
    from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
except ImportError as error:
    raise ImportError(
        f"curveball_fused.integrations.huggingface needs two packages: pip install transformers accelerate. ({error})"
    ) from error

WITHOUT_EFFECT = {
    "learning_rate": "its steps have a length of their own, on which lr = 1 is a factor; weight decay alone reads it",
    "max_grad_norm": "nothing is in .grad that could be clipped",
}
OWN_LOSS = (
    "Say how its loss is computed: CurveBallTrainer(..., compute_loss_func=lambda outputs, labels, **_: "
    "F.cross_entropy(outputs.logits.flatten(0, -2), labels.flatten())), with labels shifted where they are of the next "
    "tokens, or override `model_and_loss`."
)


class CurveBallTrainer(Trainer):
    """Be Hugging Face's `Trainer`, whose steps are CurveBall's.

    Without an optimizer of yours it is `CurveBall(..., preconditioner="kronecker")`. Give another one, or its options,
    as to any Trainer: `optimizers=(CurveBall(model.parameters(), ...), None)` or `optimizer_cls_and_kwargs=(CurveBall,
    {...})`. Schedulers, logging, evaluation, checkpoints and callbacks are the Trainer's, and so are `bf16` and `fp16`
    (whose loss scale is CurveBall's own).

    The loss is that which transformers has for the model's class, computed from its logits: cross-entropy (of the next
    token in a causal language model), mean squared error, or binary cross-entropy. In the first step it is compared
    with the one that the model returns. For any other loss give `compute_loss_func`, or override `model_and_loss`;
    `compute_loss` is for evaluation only.

    Of the `TrainingArguments`, `learning_rate` and `max_grad_norm` have no effect on a step. `weight_decay` is as
    strong as with AdamW, so that a step shrinks weights by `learning_rate * weight_decay`, times the scheduler's
    factor. With `gradient_accumulation_steps` above 1, and with several processes, a step is of all these batches as of
    one, weighted by their labels, in the memory of one.

    Args:
        args: what `Trainer` takes.
        kwargs: what `Trainer` takes.

    Raises:
        ValueError: an option cannot be used with CurveBall; the message says what to do.
        TypeError: the optimizer is another one, or `compute_loss` is overridden.

    Example::

        trainer = CurveBallTrainer(model, TrainingArguments("checkpoints"), train_dataset=texts)
        trainer.train()
    """

    optimizer: Any  # CurveBall, or what Accelerate has made of it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_loss_compared = False
        self._parts: list[tuple[Callable[[], Any], Callable[[Any], Tensor]]] = []  # of the batch, as far as collected
        self._weights: list[Tensor | None] = []
        given = self.args
        if given.n_gpu > 1:
            raise ValueError(
                "DataParallel cannot be used with CurveBall: start a process for each device with torchrun, or set "
                "CUDA_VISIBLE_DEVICES=0 before the program starts."
            )
        if given.label_smoothing_factor and self.compute_loss_func is None:
            raise ValueError(
                "label_smoothing_factor has no effect: give compute_loss_func=lambda outputs, labels, **_: "
                "F.cross_entropy(outputs.logits, labels, label_smoothing=...) instead."
            )
        if type(self).compute_loss is not Trainer.compute_loss:
            raise TypeError(
                "an overridden compute_loss is not used, as CurveBall needs the outputs and the loss as a function of "
                "them: give compute_loss_func, or override model_and_loss."
            )
        defaults = {field.name: field.default for field in fields(given)}
        for name, reason in WITHOUT_EFFECT.items():
            if getattr(given, name) not in (defaults[name], 0):
                warn_user(f"{name}={getattr(given, name)} has no effect with CurveBall: {reason}.")

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Make the optimizer where none was given.

        Args:
            model: whose parameters are trained (default: the Trainer's).

        Returns:
            The optimizer; after the Trainer has begun, as Accelerate has wrapped it.

        Raises:
            TypeError: it is no `CurveBall`.
        """
        self._parts, self._weights = [], []  # a training that was stopped may have left some
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.optimizer_cls_and_kwargs or (CurveBall, {"preconditioner": "kronecker"})
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            decayed = {name: trained[name] for name in self.get_decay_parameter_names(model) if name in trained}
            others = [p for name, p in trained.items() if name not in decayed]
            shrinkage = self.args.learning_rate * self.args.weight_decay  # AdamW's, where lr is the learning rate
            groups = [{"params": [*decayed.values()], "weight_decay": shrinkage}, {"params": others}]
            self.optimizer = kind([group for group in groups if group["params"]], **options)
        self._curveball()
        return self.optimizer

    @staticmethod
    def _shifts_labels(model: Any) -> bool:
        """Return whether the loss of a model is of the next tokens: where the labels are the tokens themselves."""
        return getattr(model, "loss_function", None) is ForCausalLMLoss and not model.config.is_encoder_decoder

    def _count_labels(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return how many labels a batch has, of those that count; None where it has none that can be counted."""
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor):
            return None
        shifts = self._shifts_labels(self.accelerator.unwrap_model(self.model))
        return (labels[..., 1:] if shifts else labels).ne(-100).sum()

    def _curveball(self) -> CurveBall:
        """Return the optimizer itself, without what Accelerate has wrapped it in."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if not isinstance(optimizer, CurveBall):
            raise TypeError(f"CurveBallTrainer needs a CurveBall as its optimizer; got {type(optimizer).__name__}.")
        return optimizer

    def model_and_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> tuple[Callable[[], Any], Callable[[Any], Tensor]]:
        """Return the two functions of a step; to be overridden for a loss that `compute_loss_func` cannot express.

        Args:
            model: as the Trainer has prepared it.
            inputs: a batch, on the model's device.
            num_items_in_batch: how many labels it has; None where they cannot be counted.

        Returns:
            `model_fn` and `loss_fn`, as of `CurveBall.step`.

        Raises:
            ValueError: the loss is not known.

        Example::

            def model_and_loss(self, model, inputs, num_items_in_batch=None):
                labels = inputs.pop("labels")
                return lambda: model(**inputs).logits, lambda logits: F.cross_entropy(logits, labels)
        """
        given = {name: value for name, value in inputs.items() if name != "labels"}
        labels, own_loss = inputs.get("labels"), self.compute_loss_func
        if own_loss is not None:
            count = int(num_items_in_batch) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
            return lambda: model(**given), lambda outputs: own_loss(outputs, labels, num_items_in_batch=count)
        inner: Any = self.accelerator.unwrap_model(model)
        if labels is None or not hasattr(inner, "loss_function"):
            raise ValueError(f"there is no known loss of {type(inner).__name__} with these inputs. {OWN_LOSS}")
        function = inner.loss_function
        if function is ForCausalLMLoss and not self._shifts_labels(inner):
            function = ForMaskedLMLoss  # its labels are not shifted; the decoder's inputs are
            given.setdefault("decoder_input_ids", _shifted(inner, labels))

        def loss_fn(logits: Tensor) -> Tensor:
            # The functions of transformers have different names for the same, and skip what is not theirs.
            loss: Tensor = function(
                logits=logits, pooled_logits=logits, labels=labels, vocab_size=logits.shape[-1], config=inner.config
            )
            return loss

        def model_fn() -> Tensor:
            logits: Tensor = model(**given).logits
            return logits

        if not self._is_loss_compared:
            _compare(model, inputs, model_fn, loss_fn)
            self._is_loss_compared = True
        return model_fn, loss_fn

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does, with its arguments and what it returns."""
        try:
            return super().train(*args, **kwargs)
        finally:
            # The last step has left it at False, by which every other optimizer of Accelerate in this process would
            # pass over its steps.
            self.accelerator.gradient_state._set_sync_gradients(True)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Take one step of CurveBall, where a Trainer calls backward(); or note a part of a step that comes later.

        Args:
            model: as the Trainer has prepared it.
            inputs: a batch, or one of those that make up a step.
            num_items_in_batch: how many labels all of them have; each is counted on its own instead.

        Returns:
            The loss before the step (0-dim), detached; zero for all batches of a step but the last.
        """
        model.train()
        inputs = self._prepare_inputs(inputs)
        count = self._count_labels(inputs)
        self._parts.append(self.model_and_loss(model, inputs, count))
        self._weights.append(count)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        (parts, weights), self._parts, self._weights = (self._parts, self._weights), [], []
        if self.args.gradient_accumulation_steps == 1 and self.args.world_size == 1:
            loss, _ = self._curveball().step(*parts[0])
        else:
            known = [weight for weight in weights if weight is not None]
            loss, _ = self._curveball().step(parts, weights=known if len(known) == len(parts) else None)
        # The loop calls optimizer.step() itself, without a closure. Accelerate's optimizer passes over that call as it
        # does between batches whose gradients are accumulated; the loop sets this anew for each batch.
        self.accelerator.gradient_state._set_sync_gradients(False)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Clip nothing, and return no norm, as nothing is in .grad."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Return no norm, so that none is logged."""


def _shifted(model: Any, labels: Tensor) -> Tensor:
    """Return the inputs of a decoder that belong to labels, as the model makes them where it is given these."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        inputs: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return inputs
    start = labels.new_full((len(labels), 1), model.config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, model.config.pad_token_id)], 1)


@torch.no_grad()
def _compare(
    model: nn.Module,
    inputs: Mapping[str, Any],
    model_fn: Callable[[], Tensor],
    loss_fn: Callable[[Tensor], Tensor],
) -> None:
    """Raise ValueError unless the two functions come to the loss that the model itself returns."""
    training, name = model.training, type(model).__name__
    model.eval()  # in which nothing is drawn or updated
    try:
        returned = model(**inputs).loss
        known = loss_fn(model_fn())
    except (AttributeError, TypeError) as error:  # no logits, or a function that needs more than these
        raise ValueError(f"the loss of {name} is not known ({error}). {OWN_LOSS}") from error
    finally:
        model.train(training)
    rounding = max(1e-4, 2 * torch.finfo(returned.dtype).eps)
    if not torch.allclose(returned.double(), known.double(), rtol=rounding):
        raise ValueError(
            f"{name} returns a loss of {float(returned):.6g}, but that of its class is {float(known):.6g} for its "
            f"logits. {OWN_LOSS}"
        )
