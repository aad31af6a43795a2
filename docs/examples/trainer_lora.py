"""Hugging Face Trainer: a small GPT-2 is adapted by LoRA to sequences of a kind that it has not seen.

+from gen_optim.integrations.transformers import GeNTrainerMixin
+class GeNTrainer(GeNTrainerMixin, Trainer): ...
-trainer = Trainer(adapted, arguments(steps, lr, warmup_steps=steps // 20), train_dataset=data)
+trainer = GeNTrainer(adapted, arguments(steps), train_dataset=data)
"""

import argparse
import itertools
import tempfile
import time

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

from gen_optim.integrations.transformers import GeNTrainerMixin


def progressions(strides: list[int], count: int = 1024) -> list[dict[str, Tensor]]:
    """Return arithmetic progressions modulo 23: eight numbers each, with one of the strides."""
    chosen = torch.tensor(strides)[torch.randint(len(strides), (count, 1))]
    rows = (torch.randint(23, (count, 1)) + chosen * torch.arange(8)) % 23
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(steps: int, lr: float = 5e-5, **others: object) -> TrainingArguments:
    """Return what both Trainers are told."""
    return TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=32,
        max_steps=steps,
        learning_rate=lr,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **others,
    )


def pretrained(steps: int) -> GPT2LMHeadModel:
    """Train a model on some strides; it stands for a checkpoint that would be downloaded."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=23, n_positions=8, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    trainer = Trainer(model, arguments(steps, 3e-3), train_dataset=progressions([1, 2, 3, 5, 8]))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model


def train(bare: bool, lr: float, seed: int, steps: int, state: dict[str, Tensor], config: GPT2Config) -> float:
    """Adapt the model to other strides; return the loss on other progressions with these."""
    model = GPT2LMHeadModel(config)
    model.load_state_dict(state)
    torch.manual_seed(seed)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    adapted = get_peft_model(model, lora)
    data, others = progressions([4, 6, 7]), progressions([4, 6, 7])
    if bare:
        trainer = Trainer(adapted, arguments(steps, lr, warmup_steps=steps // 20), train_dataset=data)
    else:

        class GeNTrainer(GeNTrainerMixin, Trainer): ...

        trainer = GeNTrainer(adapted, arguments(steps), train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.evaluate(others)["eval_loss"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a short run")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate of the bare optimizer")
    options = parser.parse_args()
    logging.set_verbosity_error()
    steps = 20 if options.quick else 400
    model = pretrained(steps)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for seed, bare in itertools.product(range(1 if options.quick else 3), (True, False)):
        began = time.perf_counter()
        loss = train(bare, options.lr, seed, steps, state, model.config)
        ms = 1e3 * (time.perf_counter() - began) / steps
        print(f"seed {seed}, {'AdamW' if bare else 'GeN(AdamW)'}: loss {loss:.4f}, {ms:.1f} ms per step")
