"""Accelerate without a trainer: prepared optimizers, accumulation, gradient scaling."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from gen_optim import GeNOptimizer, History, ProbeStatus
from gen_optim.integrations.accelerate import micro_batches
from gen_optim.tensors.dtensor import whole
from tests import documentation
from tests.training import accumulating, assert_ranks_train_as_one, mlp, parameters_of, regression_data, same, wrapped
from tests.workers import Pool

pytest.importorskip("accelerate", reason="needs the extra accelerate")

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType

from tests.integrations.accelerators import forgotten_afterwards, let_it_shard


@pytest.fixture(autouse=True)
def _forget_the_accelerator() -> Iterator[None]:
    with forgotten_afterwards():
        yield


def line_data(size: int) -> tuple[Tensor, Tensor]:
    inputs, _ = regression_data(size)
    return inputs, inputs.sum(dim=1, keepdim=True)


class Job:
    """A loop as Accelerate's documentation writes it."""

    def __init__(self, accelerator: Accelerator, *, steps: int = 40, dropout: float = 0.1, batch: int = 8) -> None:
        processes = accelerator.num_processes
        inputs, targets = line_data(batch * steps * accelerator.gradient_accumulation_steps * processes)
        self.accelerator = accelerator
        self.loader = DataLoader(TensorDataset(inputs, targets), batch_size=batch)
        model = mlp(dropout=dropout)
        self.gen = wrapped(torch.optim.AdamW(model.parameters()), burn_in=4, period=4)
        self.gen.register_probe_hook(history := History())
        self.history = history
        scheduler = torch.optim.lr_scheduler.LinearLR(self.gen, 1.0, 0.1, total_iters=steps * processes)
        self.model, self.optimizer, self.scheduler, self.loader = accelerator.prepare(
            model, self.gen, scheduler, self.loader
        )
        self.losses_of = micro_batches(accelerator, self.optimizer)
        self.losses: list[float] = []
        self.calls = 0

    def loss_of(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.mse_loss(self.model(inputs), targets)

    def train(self, skip: int = 0, stop: int = 10**9) -> Job:
        torch.manual_seed(skip)
        for index, (inputs, targets) in enumerate(self.loader):
            if not skip <= index < stop:
                continue
            with self.accelerator.accumulate(self.model):
                loss = self.losses_of.evaluate(self.loss_of, inputs, targets)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            self.losses.append(loss.item())
        return self

    def has_learned(self, factor: float = 0.6) -> bool:
        return sum(self.losses[-8:]) < factor * sum(self.losses[:8])


@pytest.mark.parametrize("accumulation", [1, 4])
def test_it_trains_as_a_hand_written_loop_does_bit_for_bit(accumulation: int) -> None:
    steps = 10
    job = Job(Accelerator(cpu=True, gradient_accumulation_steps=accumulation), steps=steps)
    model = mlp(dropout=0.1)
    optimizer = wrapped(torch.optim.AdamW(model.parameters()), burn_in=4, period=4)
    optimizer.register_probe_hook(history := History())
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    inputs, targets = line_data(8 * steps * accumulation)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=8)
    torch.manual_seed(0)
    batches = iter(loader)
    for _ in range(steps):
        of_this_step = [
            lambda x=inputs, y=targets: nn.functional.mse_loss(model(x), y)
            for inputs, targets in itertools.islice(batches, accumulation)
        ]
        optimizer.step(accumulating(optimizer, model, of_this_step, clip=0.5, is_known=False))
        scheduler.step()

    job.train()
    assert same(parameters_of(job.model), parameters_of(model))
    assert job.gen.get_last_lr() == optimizer.get_last_lr()
    assert list(job.history) == list(history)
    # Clipped gradients are no slope of the loss: it is evaluated half way too.
    assert {len(record.losses) for record in history if record.status is not ProbeStatus.STARTED} == {3}


def test_gradients_are_accumulated_and_the_loss_goes_down() -> None:
    job = Job(Accelerator(cpu=True, gradient_accumulation_steps=3)).train()
    assert job.gen.state_dict()["param_groups"][0]["gen_step"] == 40
    assert job.has_learned()


def test_bfloat16() -> None:
    job = Job(Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)).train()
    assert job.has_learned()


def float16_accelerator(**arguments: int) -> Accelerator:
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="fp16", **arguments)
    if accelerator.scaler is None:  # what Accelerate sets on an accelerator and not on a CPU
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**24)
    return accelerator


def test_float16_with_a_gradient_scaler_and_its_skipped_steps() -> None:
    job = Job(float16_accelerator(gradient_accumulation_steps=2)).train()
    assert 20 < job.gen.state_dict()["param_groups"][0]["gen_step"] < 40
    # Probes see the micro-batches of their own step, and not those of a skipped one before it.
    # The loss at averaged weights is none of those of the step.
    probes = sum(len(record.losses) - 1 + (record.excess_loss is not None) for record in job.history)
    assert job.calls == 2 * (40 + 1) + 2 * probes
    assert job.has_learned(0.7)


@pytest.mark.parametrize(("stop", "looks_back"), [(8, True), (10, False)])
def test_a_checkpoint_resumes_bit_for_bit(tmp_path: Path, stop: int, looks_back: bool) -> None:
    whole = Job(Accelerator(cpu=True, gradient_accumulation_steps=2), steps=10).train(stop=stop)
    whole.accelerator.save_state(str(tmp_path))
    state = torch.load(tmp_path / "optimizer.bin", weights_only=True)
    assert (state["param_groups"][0]["gen_start_lr"] > 0.0) is looks_back
    whole.train(skip=stop)
    resumed = Job(Accelerator(cpu=True, gradient_accumulation_steps=2), steps=10)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(skip=stop)
    assert same(parameters_of(resumed.model), parameters_of(whole.model))
    assert list(resumed.history) == list(whole.history)[-len(resumed.history) :]
    assert resumed.gen.last_probe == whole.gen.last_probe


def go_on_in_processes(kind: str, folder: str) -> dict[str, Any]:
    """Train, and go on from a checkpoint half way, on one rank of several."""
    with forgotten_afterwards():
        plugin = None
        if kind == "fully_shard":
            let_it_shard()
            plugin = FullyShardedDataParallelPlugin(2, auto_wrap_policy="size_based_wrap", min_num_params=20)

        def begin() -> Job:
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, fsdp_plugin=plugin)
            return Job(accelerator, steps=10, dropout=0.0)

        trained = begin().train(stop=10)
        trained.accelerator.save_state(folder)
        trained.train(skip=10)
        resumed = begin()
        resumed.accelerator.load_state(folder)
        resumed.train(skip=10)
        return {
            "types": {type(each) for each in trained.model.parameters()},
            "trained": [whole(each).tolist() for each in trained.model.parameters()],
            "resumed": [whole(each).tolist() for each in resumed.model.parameters()],
            "records": [(record.status, record.lr_after) for record in trained.history],
        }


@pytest.mark.parametrize(("kind", "type_of_parameters"), [("ddp", nn.Parameter), ("fully_shard", DTensor)])
def test_two_processes_train_as_one_on_the_joined_batch(
    pool: Pool, kind: str, type_of_parameters: type, tmp_path: Path
) -> None:
    ranks = pool.run(go_on_in_processes, kind, str(tmp_path))
    alone = Job(Accelerator(cpu=True, gradient_accumulation_steps=2), steps=10, dropout=0.0, batch=16).train()
    assert_ranks_train_as_one(ranks, alone.history, alone.model, type_of_parameters)


def test_a_step_without_a_loss_says_what_to_do() -> None:
    job = Job(Accelerator(cpu=True))
    with pytest.raises(RuntimeError, match=r"evaluate\(loss_of"):
        job.optimizer.step()


def test_an_optimizer_that_is_no_gen_optimizer_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(torch.optim.SGD(mlp().parameters()))
    with pytest.raises(TypeError, match="GeNOptimizer"):
        micro_batches(accelerator, prepared)


def test_deepspeed_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(GeNOptimizer(torch.optim.SGD(mlp().parameters())))
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(ValueError, match="DeepSpeed"):
        micro_batches(accelerator, prepared)


def test_without_accumulation_and_scaling_a_closure_will_do() -> None:
    accelerator = Accelerator(cpu=True)
    model = mlp()
    inputs, targets = regression_data()
    model, optimizer = accelerator.prepare(model, GeNOptimizer(torch.optim.AdamW(model.parameters())))
    losses = []
    for _ in range(40):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            losses.append(loss.item())
            return loss

        optimizer.step(closure)
    assert losses[-1] < 0.5 * losses[0]


def test_the_script_of_its_page() -> None:
    history = documentation.run("accelerate.md")["history"]
    assert sum(history[-16:]) < 0.3 * sum(history[:16])
