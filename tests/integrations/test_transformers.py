"""Hugging Face Trainer, on a small language model that learns arithmetic progressions."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gen_optim import GeNOptimizer, History, ProbeStatus, RelaxedRule
from gen_optim.integrations.micro_batches import unwrap
from gen_optim.integrations.transformers import GeNTrainerMixin
from gen_optim.tensors.dtensor import whole
from tests import documentation
from tests.training import accumulating, parameters_of, same, wrapped
from tests.workers import Pool

pytest.importorskip("transformers", reason="needs the extra transformers")
pytest.importorskip("accelerate", reason="needs the extra transformers")

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from tests.integrations.accelerators import forgotten_afterwards, let_it_shard


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


def arguments(**given: Any) -> TrainingArguments:
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
    return TrainingArguments(**(settings | given))


def trainer(folder: Path, model: nn.Module | None = None, *, options: Any = None, given: Any = None, **settings: Any):
    return GeNTrainer(
        model=language_model() if model is None else model,
        args=arguments(output_dir=str(folder), **settings),
        train_dataset=progressions(),
        eval_dataset=progressions(16),
        optimizers=(given, None),
        gen_options=gen_options(**options) if options else None,
    )


def gen_options(burn_in: int = 50, period: int = 8, **options: Any) -> dict[str, Any]:
    return {"rule": RelaxedRule(burn_in=burn_in, period=period), **options}


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
    run.create_optimizer().register_probe_hook(history := History())
    run.train()

    model = language_model()
    by_hand = trainer(tmp_path, model, gradient_accumulation_steps=accumulation)
    optimizer = wrapped(Trainer.create_optimizer(by_hand), burn_in=4, period=4)
    optimizer.register_probe_hook(twin := History())
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
        items = torch.tensor(sum(batch.numel() for batch in micro_batches))
        losses_of = [
            lambda x=batch, items=items: model(input_ids=x, labels=x, num_items_in_batch=items).loss
            for batch in micro_batches
        ]
        optimizer.step(accumulating(optimizer, model, losses_of, clip=clip, average=False, is_known=False))
        rates.append(optimizer.get_last_lr()[0])
        scheduler.step()

    assert same(parameters_of(run.model), parameters_of(model))
    assert logged_rates(run) == rates
    assert len(set(rates)) > steps // 2
    assert list(history) == list(twin)
    # Clipped by the Trainer, gradients are no slope of the loss: it is evaluated half way too.
    assert {len(record.losses) for record in history if record.status is not ProbeStatus.STARTED} == {3}


@pytest.mark.parametrize("lr", [1e-7, 10.0])
def test_it_learns_from_any_learning_rate_with_the_default_schedule(tmp_path: Path, lr: float) -> None:
    run = trainer(tmp_path, learning_rate=lr, max_steps=80)
    run.train()
    assert run.args.lr_scheduler_type == "linear"
    assert mean(losses(run)[-5:]) < 0.7 * losses(run)[0]
    assert logged_rates(run)[-1] == unwrap(run.optimizer).get_last_lr()[0]


@pytest.mark.parametrize("mode", ["lookback", "approximate"])
def test_every_probe_sees_all_micro_batches_of_its_step_and_no_other(tmp_path: Path, mode: str) -> None:
    seen: list[tuple[bool, int]] = []

    class Watched(GeNTrainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Any:
            seen.append((unwrap(self.optimizer).is_probing, int(inputs["input_ids"].double().pow(3).sum())))
            return super().compute_loss(model, inputs, **kwargs)

    run = trainer(
        tmp_path, gradient_accumulation_steps=3, max_steps=8, options={"mode": mode, "burn_in": 4, "period": 2}
    )
    run.__class__ = Watched
    history = History()
    run.create_optimizer().register_probe_hook(history)
    run.train()
    # Between two steps: three passes with gradients, then the same three for each probe.
    calls = iter(seen)
    # The loss at averaged weights is none of those of the step.
    probes = {record.step: len(record.losses) - 1 + (record.excess_loss is not None) for record in history}
    probes[history[0].step] += 1  # the first probe step evaluates the loss once more, to compare
    for step in range(1, 9):
        passes = [next(calls) for _ in range(3)]
        assert [is_probe for is_probe, _ in passes] == [False] * 3
        for _ in range(probes.get(step, 0)):
            assert [next(calls) for _ in range(3)] == [(True, batch) for _, batch in passes]
    assert len(history) >= 5
    assert next(calls, None) is None


@pytest.mark.parametrize(("burn_in", "period", "looks_back"), [(50, 4, True), (0, 10, False)])
def test_resuming_from_a_checkpoint_is_bit_for_bit(tmp_path: Path, burn_in: int, period: int, looks_back: bool) -> None:
    arguments: dict[str, Any] = {
        "max_steps": 14,
        "save_strategy": "steps",
        "save_steps": 7,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "random",
        "options": {"burn_in": burn_in, "period": period},
    }
    whole = trainer(tmp_path / "whole", **arguments)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-7"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert (state["param_groups"][0]["gen_start_lr"] > 0.0) is looks_back
    resumed = trainer(tmp_path / "resumed", **arguments)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 14
    assert same(parameters_of(resumed.model), parameters_of(whole.model))
    assert logged_rates(resumed) == logged_rates(whole)
    assert unwrap(resumed.optimizer).last_probe == unwrap(whole.optimizer).last_probe


def test_what_is_to_be_looked_back_at_outlives_evaluation(tmp_path: Path) -> None:
    histories = []
    for strategy in ("no", "steps"):
        run = trainer(tmp_path, language_model(dropout=0.0), max_steps=8, eval_strategy=strategy, eval_steps=1)
        run.create_optimizer().register_probe_hook(history := History())
        run.train()
        histories.append(list(history))
    assert histories[0] == histories[1]
    assert len(histories[0]) == 7


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
    assert unwrap(run.optimizer).state_dict()["param_groups"][0]["gen_step"] == 50 - skipped
    assert mean(losses(run)[-5:]) < 0.8 * losses(run)[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Accelerate has fp16 on accelerators alone, and none is here")
def test_it_trains_in_float16(tmp_path: Path) -> None:
    run = trainer(tmp_path, fp16=True, use_cpu=False, max_steps=60, gradient_accumulation_steps=2)
    run.train()
    assert mean(losses(run)[-5:]) < 0.75 * losses(run)[0]


def go_on_in_processes(kind: str, folder: str) -> dict[str, Any]:
    """Train, and go on from a checkpoint half way, on one rank of several."""
    with forgotten_afterwards():
        histories = []

        def begin(name: str) -> GeNTrainer:
            settings: dict[str, Any] = {"output_dir": f"{folder}/{name}", "save_strategy": "steps", "save_steps": 10}
            if kind == "fully_shard":
                settings |= {
                    "fsdp": True,
                    "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]},
                }
            args = arguments(per_device_train_batch_size=4, max_steps=14, gradient_accumulation_steps=2, **settings)
            assert args.world_size == 2
            if kind == "fully_shard":
                let_it_shard()
            run = GeNTrainer(
                language_model(dropout=0.0),
                args,
                train_dataset=progressions(),
                gen_options=gen_options(burn_in=4, period=4),
            )
            run.create_optimizer().register_probe_hook(history := History())
            histories.append(history)
            return run

        trained = begin("trained")
        trained.train()
        resumed = begin("resumed")
        resumed.train(resume_from_checkpoint=f"{folder}/trained/checkpoint-10")
        return {
            "types": {type(each) for each in trained.model.parameters()},
            "trained": [whole(each).tolist() for each in trained.model.parameters()],
            "resumed": [whole(each).tolist() for each in resumed.model.parameters()],
            "rates": (logged_rates(trained), logged_rates(resumed)),
            "statuses": [record.status for record in histories[0]],
        }


@pytest.mark.parametrize(("kind", "type_of_parameters"), [("ddp", nn.Parameter), ("fully_shard", DTensor)])
def test_two_processes_train_as_one_on_the_joined_batch(
    pool: Pool, kind: str, type_of_parameters: type, tmp_path: Path
) -> None:
    one, other = pool.run(go_on_in_processes, kind, str(tmp_path))
    options = {"burn_in": 4, "period": 4}
    alone = trainer(tmp_path, language_model(dropout=0.0), max_steps=14, gradient_accumulation_steps=2, options=options)
    alone.create_optimizer().register_probe_hook(history := History())
    alone.train()
    assert one == other
    assert one["types"] == {type_of_parameters}
    assert one["resumed"] == one["trained"]
    trained, resumed = one["rates"]
    assert resumed == trained
    assert trained == pytest.approx(logged_rates(alone), rel=1e-3)
    assert one["statuses"] == [record.status for record in history]
    torch.testing.assert_close([torch.tensor(each) for each in one["trained"]], parameters_of(alone.model))


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
