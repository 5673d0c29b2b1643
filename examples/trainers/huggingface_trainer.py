"""Train a language model with Hugging Face's Trainer: CurveBallTrainer in its place, the rest as ever.

pip install transformers accelerate
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from curveball_fused.integrations.huggingface import CurveBallTrainer


def make_model():
    torch.manual_seed(0)
    # Of random weights, and small enough for a processor; GPT2LMHeadModel.from_pretrained("gpt2") is used likewise.
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def make_data():
    """128 texts of 16 tokens, each of which is the last one plus a number of its text's own."""
    numbers = torch.Generator().manual_seed(1)
    first, step = torch.randint(32, (2, 128, 1), generator=numbers)
    texts = (first + step * torch.arange(16)) % 32
    return [{"input_ids": text, "labels": text} for text in texts]


def train(epochs, folder, resume=False):
    arguments = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        lr_scheduler_type="constant",  # a factor on the step, from 1
        save_strategy="epoch",
        logging_strategy="epoch",
        report_to="none",
    )
    # With optimizers=(CurveBall(model.parameters(), ...), None) for options of your own.
    trainer = CurveBallTrainer(make_model(), arguments, train_dataset=make_data())
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if resume else None)
    return trainer.model


if __name__ == "__main__":
    train(2, "checkpoint")
    model = train(4, "checkpoint", resume=True)  # the third and the fourth epoch, as if nothing had come between
