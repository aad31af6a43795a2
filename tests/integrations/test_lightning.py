"""Lightning: automatic and manual optimisation, logging, metrics, precision, checkpoints."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from gen_optim import History, ProbeStatus
from gen_optim.tensors.dtensor import whole
from tests import documentation
from tests.training import accumulating, assert_ranks_train_as_one, mlp, parameters_of, regression_data, same, wrapped
from tests.workers import Pool

pytest.importorskip("lightning", reason="needs the extra lightning")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.tuner import Tuner
from torchmetrics import MeanMetric, MeanSquaredError, MetricCollection, SumMetric

from gen_optim.integrations.lightning import GeNCallback, _preserving_metrics

# What torch says of Lightning, and Lightning of small trainings without workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

STEPS = 24
OPTIONS = {"burn_in": 4, "period": 4}
MODES = ["lookback", "approximate"]


def batches(accumulation: int = 1, steps: int = STEPS) -> DataLoader[tuple[Tensor, ...]]:
    inputs, targets = regression_data(8 * steps * accumulation)
    return DataLoader(TensorDataset(inputs, targets), batch_size=8)


class Regression(LightningModule):
    """Logs, and updates metrics, in ``training_step``."""

    def __init__(self, steps: int = STEPS, dropout: float = 0.1, **options: Any) -> None:
        super().__init__()
        self.model = mlp(dropout=dropout, norm=True)
        self.options, self.steps = OPTIONS | options, steps
        self.seen = SumMetric()
        self.errors = MetricCollection({"squared": MeanSquaredError(), "again": MeanSquaredError(squared=True)})
        self.average = MeanMetric()
        self.calls = self.hooks = 0
        self.history = History()

    def configure_optimizers(self) -> Any:
        self.gen = wrapped(torch.optim.AdamW(self.model.parameters()), **self.options)
        self.gen.register_probe_hook(self.history)
        scheduler = torch.optim.lr_scheduler.LinearLR(self.gen, 1.0, 0.1, total_iters=self.steps)
        return {"optimizer": self.gen, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def loss_of(self, batch: list[Tensor]) -> Tensor:
        inputs, targets = batch
        predictions = self.model(inputs)
        loss = nn.functional.mse_loss(predictions, targets)
        self.calls += 1
        self.seen(len(inputs))
        self.errors(predictions, targets)
        self.average.update(loss)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("count", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return {"loss": self.loss_of(batch), "extra": batch_idx}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.hooks += 1
        assert all(each.grad is not None for each in self.model.parameters())

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.hooks += 1

    def on_after_backward(self) -> None:
        self.hooks += 1
        assert all(each.grad is not None for each in self.model.parameters())


class ManualRegression(Regression):
    def __init__(self, how: str, **options: Any) -> None:
        super().__init__(**options)
        self.how, self.automatic_optimization = how, False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss_of(batch)
            self.manual_backward(loss)
            return loss

        if self.how == "closure":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step(probe=lambda: self.loss_of(batch))
        self.lr_schedulers().step()


def fit(module: LightningModule, folder: Path, *, resume: Path | None = None, **arguments: Any) -> Trainer:
    loader, validation = arguments.pop("loader", None), arguments.pop("val_dataloaders", None)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=arguments.pop("max_epochs", 1),
        default_root_dir=folder,
        log_every_n_steps=1,
        logger=CSVLogger(folder),
        callbacks=[GeNCallback(), *arguments.pop("callbacks", [])],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=arguments.pop("enable_checkpointing", False),
        **arguments,
    )
    torch.manual_seed(0)
    trainer.fit(module, batches() if loader is None else loader, validation, ckpt_path=resume)
    return trainer


def logged(trainer: Trainer, name: str) -> dict[int, float]:
    """What the logger has written under a name, by step."""
    rows = csv.DictReader((Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines())
    return {int(row["step"]): float(row[name]) for row in rows if row[name]}


def by_hand(accumulation: int = 1, clip: float | None = None, **options: Any) -> Regression:
    """The same training without Lightning."""
    module = Regression(**options)
    model = module.model
    scheduler = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    optimizer = module.gen
    torch.manual_seed(0)
    rows = iter(batches(accumulation))
    for _ in range(STEPS):
        of_this_step = [
            lambda x=inputs, y=targets: nn.functional.mse_loss(model(x), y)
            for inputs, targets in itertools.islice(rows, accumulation)
        ]
        optimizer.step(accumulating(optimizer, model, of_this_step, clip=clip, is_known=accumulation == 1))
        scheduler.step()
    return module


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_it_trains_as_a_hand_written_loop_does_bit_for_bit(
    tmp_path: Path, accumulation: int, clip: float | None, mode: str
) -> None:
    module = Regression(mode=mode)
    fit(
        module,
        tmp_path,
        loader=batches(accumulation),
        accumulate_grad_batches=accumulation,
        gradient_clip_val=clip,
    )
    twin = by_hand(accumulation, clip, mode=mode)
    assert same(parameters_of(module.model), parameters_of(twin.model))
    assert same(list(module.model.buffers()), list(twin.model.buffers()))
    assert module.gen.get_last_lr() == twin.gen.get_last_lr()
    assert list(module.history) == list(twin.history)
    evaluated = {len(record.losses) for record in module.history if record.status is not ProbeStatus.STARTED}
    assert evaluated == ({2} if mode == "lookback" and accumulation == 1 else {3})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_logging_metrics_and_hooks_count_once(tmp_path: Path, accumulation: int, mode: str) -> None:
    module = Regression(mode=mode)
    trainer = fit(module, tmp_path, loader=batches(accumulation), accumulate_grad_batches=accumulation)
    all_batches = STEPS * accumulation
    assert module.calls > all_batches  # it was probed
    assert trainer.callback_metrics["count"] == all_batches
    assert trainer.callback_metrics["seen"] == 8 * all_batches
    assert module.average.update_count == all_batches
    assert module.errors["squared"].total == 8 * all_batches
    assert module.errors["again"].compute() == module.errors["squared"].compute()
    assert module.hooks == all_batches + 2 * STEPS


def test_metrics_that_were_updated_in_inference_mode_are_put_back() -> None:
    """As ``trainer.validate`` does, before ``trainer.fit``."""
    module = Regression()
    with torch.inference_mode():
        module.seen.update(torch.ones(2))
        assert module.seen.compute() == 2.0
    with _preserving_metrics(module):
        module.seen(torch.ones(3))
    assert module.seen.compute() == 2.0
    module.seen.update(torch.ones(1))
    assert module.seen.compute() == 3.0


def test_the_learning_rate_is_logged_at_every_step(tmp_path: Path) -> None:
    class Watching(Regression):
        rates: list[float]

        def on_train_batch_end(self, *args: Any) -> None:
            self.rates = [*getattr(self, "rates", []), self.gen.get_last_lr()[0]]

    module = Watching()
    with pytest.warns(
        UserWarning, match="LearningRateMonitor draws the scheduler's own .*as 'learning_rate'"
    ) as caught:
        trainer = fit(module, tmp_path, callbacks=[LearningRateMonitor()])
    assert sum("LearningRateMonitor draws" in str(each.message) for each in caught) == 1
    rates = logged(trainer, "learning_rate")
    assert list(rates) == list(range(STEPS))
    assert list(rates.values()) == pytest.approx(module.rates)
    assert len(set(module.rates)) > STEPS // 2
    assert trainer.progress_bar_metrics["learning_rate"] == pytest.approx(module.rates[-1])


def test_a_monitor_draws_what_is_in_force_without_a_scheduler(tmp_path: Path) -> None:
    class Unscheduled(Regression):
        def configure_optimizers(self) -> Any:
            self.gen = wrapped(torch.optim.AdamW(self.model.parameters()), **self.options)
            return self.gen

    fit(Unscheduled(), tmp_path, callbacks=[LearningRateMonitor()])  # and is not warned of


def test_lightnings_own_search_for_a_learning_rate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="learning-rate finder"):
        fit(Regression(), tmp_path, callbacks=[LearningRateFinder()])
    quiet: dict[str, Any] = {"logger": False, "max_epochs": 1, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[GeNCallback()], **quiet)
    with pytest.raises(ValueError, match="Leave the finder out"):
        Tuner(trainer).lr_find(Regression(), batches())


def test_a_bare_step_of_manual_optimisation_without_the_callback_says_what_to_do(tmp_path: Path) -> None:
    class Bare(ManualRegression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.manual_backward(self.loss_of(batch))
            self.optimizers().step()

    trainer = Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, logger=False)
    with pytest.raises(TypeError, match=r"as Lightning does in manual optimization .* give step"):
        trainer.fit(Bare("bare"), batches())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["closure", "probe"])
def test_manual_optimisation(tmp_path: Path, how: str, mode: str) -> None:
    module = ManualRegression(how, mode=mode)
    trainer = fit(module, tmp_path)
    twin = by_hand(mode=mode)
    assert [record.step for record in module.history] == [record.step for record in twin.history]
    assert trainer.callback_metrics["count"] == STEPS
    assert trainer.callback_metrics["seen"] == 8 * STEPS
    assert module.hooks == 2 * STEPS
    assert "learning_rate" in trainer.callback_metrics
    if how == "closure":
        assert same(parameters_of(module.model), parameters_of(twin.model))


def line(steps: int, accumulation: int = 1) -> DataLoader[tuple[Tensor, ...]]:
    inputs, _ = regression_data(8 * steps * accumulation)
    return DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=8)


def learns(trainer: Trainer, factor: float) -> bool:
    losses = list(logged(trainer, "loss_step").values())
    return sum(losses[-8:]) < factor * sum(losses[:8])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_goes_down_in_bfloat16(tmp_path: Path, accumulation: int) -> None:
    module = Regression(steps=60, burn_in=50)
    assert learns(
        fit(
            module,
            tmp_path,
            loader=line(60, accumulation),
            precision="bf16-mixed",
            accumulate_grad_batches=accumulation,
        ),
        0.6,
    )


# torch does not see that a scaler has skipped the first step, whatever the optimizer.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_float16_with_a_gradient_scaler_and_its_skipped_steps(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    module = Regression(steps=60, burn_in=50)
    trainer = fit(
        module, tmp_path, loader=line(60), plugins=[MixedPrecision("16-mixed", "cpu", scaler)], gradient_clip_val=5.0
    )
    skipped = 24 - int(torch.tensor(scaler.get_scale()).log2())
    assert skipped >= 2
    assert module.gen.state_dict()["param_groups"][0]["gen_step"] == 60 - skipped
    assert len(module.history) > 40
    assert trainer.callback_metrics["count"] == 60
    assert learns(trainer, 0.7)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(("epoch", "looks_back"), [(0, False), (1, True)])
def test_a_checkpoint_resumes_bit_for_bit(tmp_path: Path, epoch: int, looks_back: bool) -> None:
    class Reseeding(Regression):
        def on_train_batch_start(self, *args: Any) -> None:
            torch.manual_seed(self.global_step)  # Lightning's checkpoints do not keep random streams

    def trained(folder: Path, resume: Path | None = None) -> Regression:
        module = Reseeding(burn_in=50) if looks_back else Reseeding(burn_in=4, period=20)
        checkpoints = ModelCheckpoint(dirpath=folder / "kept", save_top_k=-1, filename="{epoch}")
        arguments: dict[str, Any] = {"callbacks": [checkpoints], "enable_checkpointing": True, "max_epochs": 4}
        fit(module, folder, loader=batches(steps=6), resume=resume, **arguments)
        return module

    whole = trained(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "kept" / f"epoch={epoch}.ckpt"
    [state] = torch.load(checkpoint, weights_only=False)["optimizer_states"]
    assert (state["param_groups"][0]["gen_start_lr"] > 0.0) is looks_back
    resumed = trained(tmp_path / "resumed", checkpoint)
    assert same(parameters_of(resumed.model), parameters_of(whole.model))
    assert resumed.gen.last_probe == whole.gen.last_probe
    assert list(resumed.history) == list(whole.history)[-len(resumed.history) :]
    assert 0 < len(resumed.history) < len(whole.history)


def test_what_is_to_be_looked_back_at_outlives_validation(tmp_path: Path) -> None:
    class Validating(Regression):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.validated = getattr(self, "validated", 0) + 1
            self.log("validation", nn.functional.mse_loss(self.model(batch[0]), batch[1]))

    module = Validating(dropout=0.0)  # a loader of validation data draws a random number
    fit(module, tmp_path, val_dataloaders=batches(steps=2), val_check_interval=1, num_sanity_val_steps=0)
    assert module.validated == 2 * STEPS
    assert list(module.history) == list(by_hand(dropout=0.0).history)


class Sharded(Regression):
    """Without dropout, and sharded where the strategy has a mesh."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model = mlp()

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def go_on_in_processes(kind: str, folder: str) -> dict[str, Any]:
    """Train, and go on from a checkpoint after the first epoch, on one rank of several."""

    data = batches(2, steps=12).dataset

    def trained(name: str, resume: Path | None = None) -> tuple[Sharded, Trainer]:
        module = Sharded()
        sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        trainer = fit(
            module,
            Path(folder),
            # Lightning's own sampler shuffles.
            loader=DataLoader(data, batch_size=8, sampler=DistributedSampler(data, shuffle=False)),
            use_distributed_sampler=False,
            resume=resume,
            strategy=sharded if kind == "fully_shard" else kind,
            devices=2,
            accumulate_grad_batches=2,
            max_epochs=2,
            enable_checkpointing=True,
            callbacks=[ModelCheckpoint(dirpath=f"{folder}/{name}", save_top_k=-1, filename="{epoch}")],
        )
        return module, trainer

    first, trainer = trained("first")
    resumed, _ = trained("resumed", Path(folder, "first", "epoch=0.ckpt"))
    return {
        "types": {type(each) for each in first.model.parameters()},
        "trained": [whole(each).tolist() for each in first.model.parameters()],
        "resumed": [whole(each).tolist() for each in resumed.model.parameters()],
        "records": [(record.status, record.lr_after) for record in first.history],
        "counts": (first.hooks, first.average.update_count, int(trainer.callback_metrics["count"])),
    }


@pytest.mark.parametrize(("kind", "type_of_parameters"), [("ddp", nn.Parameter), ("fully_shard", DTensor)])
def test_two_processes_train_as_one_on_the_joined_batch(
    pool: Pool, kind: str, type_of_parameters: type, tmp_path: Path
) -> None:
    ranks = pool.run(go_on_in_processes, kind, str(tmp_path))
    alone = Sharded()
    loader = DataLoader(batches(2, steps=12).dataset, batch_size=16)
    fit(alone, tmp_path, loader=loader, max_epochs=2, accumulate_grad_batches=2)
    assert_ranks_train_as_one(ranks, alone.history, alone.model, type_of_parameters)
    assert ranks[0]["counts"] == (alone.hooks, alone.average.update_count, 12)


def test_a_module_without_a_gen_optimizer_is_refused(tmp_path: Path) -> None:
    class Plain(Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="configure_optimizers"):
        fit(Plain(), tmp_path)


def test_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False)
    # The strategy cannot be made without its package.
    monkeypatch.setattr(Trainer, "strategy", object.__new__(DeepSpeedStrategy))
    with pytest.raises(ValueError, match="DeepSpeed"):
        GeNCallback().setup(trainer, Regression(), "fit")


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_module_that_draws_its_own_batches_is_refused(tmp_path: Path) -> None:
    class Drawing(Regression):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            return self.loss_of(next(dataloader_iter)[0])

    with pytest.raises(ValueError, match="dataloader_iter"):
        fit(Drawing(), tmp_path)


def test_a_batch_that_a_hook_skips_is_not_probed(tmp_path: Path) -> None:
    class Skipping(Regression):
        probed: tuple[int, ...] = ()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

        def loss_of(self, batch: list[Tensor]) -> Tensor:
            self.probed += (len(batch[0]),) if self.gen.is_probing else ()
            return super().loss_of(batch)

    module = Skipping(burn_in=50)
    fit(module, tmp_path, max_epochs=2)
    assert [record.step for record in module.history] == [1, 3, 4]  # two steps an epoch; no copy after the first of all
    # One more in the first probe step, to compare.
    assert len(module.probed) == 1 + sum(len(record.losses) - 1 for record in module.history)


def test_the_optimizers_are_left_as_they_were(tmp_path: Path) -> None:
    module = Regression()
    fit(module, tmp_path)
    assert not module.gen._optimizer_step_pre_hooks
    assert module.log.__func__ is LightningModule.log


@pytest.mark.filterwarnings("ignore:.*Checkpoint directory")
def test_the_script_of_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = documentation.run("lightning.md")
    assert names["trainer"].callback_metrics["loss_epoch"] < 0.3 * names["inputs"][:, :2].prod(dim=1).var()
