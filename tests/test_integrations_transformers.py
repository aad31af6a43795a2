"""Hugging Face Trainer, on a small language model that learns arithmetic progressions."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gen_optim import GeNOptimizer, History
from gen_optim.integrations.micro_batches import unwrap
from gen_optim.integrations.transformers import GeNTrainerMixin
from tests import documentation
from tests.training import parameters_of, same

pytest.importorskip("transformers", reason="needs the extra transformers")
pytest.importorskip("accelerate", reason="needs the extra transformers")

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments


class GeNTrainer(GeNTrainerMixin, Trainer): ...


TERMS, NUMBERS = 8, 12


def progressions(size: int = 288) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(NUMBERS, (size, 1), generator=generator)
    strides = torch.randint(1, 4, (size, 1), generator=generator)
    rows = (starts + strides * torch.arange(TERMS)) % NUMBERS
    return [{"input_ids": row, "labels": row} for row in rows]


def language_model(dropout: float = 0.1) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=NUMBERS,
        n_positions=TERMS,
        n_embd=24,
        n_layer=1,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    return GPT2LMHeadModel(config)


def trainer(folder: Path, model: nn.Module | None = None, *, options: Any = None, given: Any = None, **arguments: Any):
    settings = {
        "per_device_train_batch_size": 8,
        "max_steps": 30,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    return GeNTrainer(
        model=language_model() if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **(settings | arguments)),
        train_dataset=progressions(),
        optimizers=(given, None),
        gen_options=options,
    )


class StreamAtStart(TrainerCallback):
    """The random stream when the first step begins: iterating over a loader draws from it before."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.stream = torch.get_rng_state()


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def logged_rates(run: Trainer) -> list[float]:
    return [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_it_trains_as_a_hand_written_loop_does_bit_for_bit(tmp_path: Path, accumulation: int) -> None:
    steps, clip = 12, 0.5
    run = trainer(
        tmp_path,
        options={"burn_in": 4, "period": 4},
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        max_grad_norm=clip,
        lr_scheduler_type="linear",
        warmup_steps=3,
    )
    start = StreamAtStart()
    run.add_callback(start)
    run.train()

    model = language_model()
    by_hand = trainer(tmp_path, model, gradient_accumulation_steps=accumulation)
    optimizer = GeNOptimizer(Trainer.create_optimizer(by_hand), burn_in=4, period=4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / 3 if step < 3 else (steps - step) / (steps - 3)
    )
    rows = torch.stack([row["input_ids"] for row in progressions()])
    batches = iter(rows.split(8))
    torch.set_rng_state(start.stream)
    model.train()
    rates = []
    for _ in range(steps):
        micro_batches = list(itertools.islice(batches, accumulation))

        def closure(micro_batches: list[Tensor] = micro_batches) -> Tensor:
            model.zero_grad()
            total = torch.zeros(())
            items = sum(batch.numel() for batch in micro_batches)
            for batch in micro_batches:
                loss = model(input_ids=batch, labels=batch, num_items_in_batch=torch.tensor(items)).loss
                loss.backward()
                total = total + loss.detach()
            if not optimizer.is_probing:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            return total

        optimizer.step(closure)
        rates.append(optimizer.get_last_lr()[0])
        scheduler.step()

    assert same(parameters_of(run.model), parameters_of(model))
    assert logged_rates(run) == rates
    assert len(set(rates)) > steps // 2


@pytest.mark.parametrize("lr", [1e-7, 10.0])
def test_it_learns_from_any_learning_rate_with_the_default_schedule(tmp_path: Path, lr: float) -> None:
    run = trainer(tmp_path, learning_rate=lr, max_steps=80)
    run.train()
    assert run.args.lr_scheduler_type == "linear"
    assert mean(losses(run)[-5:]) < 0.7 * losses(run)[0]
    assert logged_rates(run)[-1] == unwrap(run.optimizer).get_last_lr()[0]


def test_every_probe_sees_all_micro_batches_of_its_step_and_no_other(tmp_path: Path) -> None:
    seen: list[tuple[bool, int]] = []

    class Watched(GeNTrainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Any:
            seen.append((unwrap(self.optimizer).is_probing, int(inputs["input_ids"].double().pow(3).sum())))
            return super().compute_loss(model, inputs, **kwargs)

    run = trainer(tmp_path, gradient_accumulation_steps=3, max_steps=6, options={"mode": "approximate", "burn_in": 6})
    run.__class__ = Watched
    history = History()
    run.create_optimizer().register_probe_hook(history)
    run.train()
    # Between two steps: three passes with gradients, then the same three for each probe.
    calls = iter(seen)
    for record in history:
        passes = [next(calls) for _ in range(3)]
        assert [is_probe for is_probe, _ in passes] == [False] * 3
        for _ in range(len(record.losses) - 1):
            assert [next(calls) for _ in range(3)] == [(True, batch) for _, batch in passes]
    assert len(history) == 6
    assert next(calls, None) is None


def test_resuming_from_a_checkpoint_is_bit_for_bit(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "max_steps": 14,
        "save_strategy": "steps",
        "save_steps": 7,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "random",
    }
    whole = trainer(tmp_path / "whole", **arguments)
    whole.train()
    resumed = trainer(tmp_path / "resumed", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7"))
    assert resumed.state.global_step == 14
    assert same(parameters_of(resumed.model), parameters_of(whole.model))
    assert logged_rates(resumed) == logged_rates(whole)
    assert unwrap(resumed.optimizer).last_probe == unwrap(whole.optimizer).last_probe


# peft asks transformers for what that has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_it_adapts_a_model_with_low_rank_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft, of the extra integrations")
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], modules_to_save=["lm_head"], fan_in_fan_out=True)
    model = peft.get_peft_model(language_model(), config)
    frozen = [each.detach().clone() for each in model.parameters() if not each.requires_grad]
    run = trainer(tmp_path, model, max_steps=60, per_device_train_batch_size=16)
    run.train()
    assert mean(losses(run)[-5:]) < 0.9 * losses(run)[0]
    assert same(frozen, [each.detach() for each in model.parameters() if not each.requires_grad])


def test_it_trains_under_bfloat16_autocast(tmp_path: Path) -> None:
    run = trainer(tmp_path, bf16=True, max_steps=60, activation_checkpointing=True, label_smoothing_factor=0.05)
    run.train()
    assert mean(losses(run)[-5:]) < 0.75 * losses(run)[0]


def test_float16_with_a_gradient_scaler_and_its_skipped_steps(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=50, fp16=True, gradient_accumulation_steps=2)
    # What Accelerate sets on an accelerator and not on a CPU; so large a scale that the first gradients overflow.
    run.accelerator.native_amp = True
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    run.train()
    skipped = 24 - int(torch.tensor(run.accelerator.scaler.get_scale()).log2())
    assert skipped >= 2
    assert unwrap(run.optimizer).param_groups[0]["gen_step"] == 50 - skipped
    assert mean(losses(run)[-5:]) < 0.8 * losses(run)[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Accelerate has fp16 on accelerators alone, and none is here")
def test_it_trains_in_float16(tmp_path: Path) -> None:
    run = trainer(tmp_path, fp16=True, use_cpu=False, max_steps=60, gradient_accumulation_steps=2)
    run.train()
    assert mean(losses(run)[-5:]) < 0.75 * losses(run)[0]


def test_a_given_optimizer_is_wrapped_and_a_given_gen_optimizer_kept(tmp_path: Path) -> None:
    model = language_model()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = trainer(tmp_path, model, given=base, options={"period": 3})
    assert run.create_optimizer().base_optim is base
    own = GeNOptimizer(torch.optim.SGD(model.parameters()))
    run = trainer(tmp_path, model, given=own)
    run.args.max_steps = 2
    run.train()
    run.train()
    assert unwrap(run.optimizer) is own
    assert own.last_probe.step == 4


def test_a_mixin_that_comes_last_is_refused() -> None:
    with pytest.raises(TypeError, match="before Trainer"):
        type("Late", (Trainer, GeNTrainerMixin), {})


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="DeepSpeed"):
        run.create_optimizer()


def test_the_script_of_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    losses = documentation.run("transformers.md")["losses"]
    assert losses[-1] < 0.6 * losses[0]
