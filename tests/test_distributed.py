"""Real processes that train one model together, and some that do not."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gen_optim.distributed import Ranks
from tests import documentation, rank_jobs
from tests.training import gen_adamw, mlp
from tests.workers import FailedError, Pool

Run = Callable[..., list[Any]]


@pytest.fixture(params=["gloo", "nccl"])
def run(request: pytest.FixtureRequest, pool: Pool) -> Run:
    def run(function: Callable[..., Any], *arguments: Any, size: int = 2) -> list[Any]:
        if request.param == "nccl" and torch.cuda.device_count() < size:
            pytest.skip(f"nccl needs {size} CUDA devices, one a rank: there are {torch.cuda.device_count()}")
        return pool.run(function, *arguments, size=size, backend=request.param)

    return run


def distance(left: Any, right: Any) -> float:
    """Of two lists of parameters, relative."""
    pairs = [
        (torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64))
        for one, other in zip(left, right, strict=True)
    ]
    difference = sum((one - other).square().sum() for one, other in pairs)
    return float((difference / sum(other.square().sum() for _, other in pairs)).sqrt())


def assert_alike(ranks: list[Any]) -> None:
    for rank in ranks[1:]:
        assert rank == ranks[0]


def assert_like_one_process(ranks: list[Any], alone: dict[str, Any]) -> None:
    assert_alike(ranks)
    assert ranks[0]["statuses"] == alone["statuses"]
    assert ranks[0]["calls"] == alone["calls"]
    assert ranks[0]["lrs"] == pytest.approx(alone["lrs"], rel=1e-5)
    assert distance(ranks[0]["parameters"], alone["parameters"]) < 1e-5


@pytest.mark.parametrize(
    ("kind", "size"), [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("tp", 2), ("fsdp_and_tp", 4)]
)
def test_ranks_train_as_one_process_on_the_joined_batch(run: Run, kind: str, size: int) -> None:
    assert_like_one_process(run(rank_jobs.train, kind, 100, size=size), rank_jobs.train("plain", 100))


@pytest.mark.parametrize(
    ("kind", "size"), [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("hsdp", 4), ("tp", 2), ("fsdp_and_tp", 4)]
)
@pytest.mark.parametrize("make", ["adamw", "sgd"])
def test_looking_back(run: Run, kind: str, size: int, make: str) -> None:
    options = {"mode": "lookback", "make": make}
    alone = rank_jobs.train("plain", 100, **options)
    assert_like_one_process(run(functools.partial(rank_jobs.train, kind, 100, **options), size=size), alone)
    assert {len(losses) for losses in alone["losses"][1:]} == {2}


@pytest.mark.parametrize(("kind", "size"), [("ddp", 2), ("fsdp", 2), ("hsdp", 4), ("tp", 2), ("fsdp_and_tp", 4)])
def test_the_search_knows_how_long_the_first_step_is(run: Run, kind: str, size: int) -> None:
    ranks, alone = run(rank_jobs.train_without_a_minimum, kind, size=size), rank_jobs.train_without_a_minimum("plain")
    assert_alike(ranks)
    assert ranks[0] == {"lr": pytest.approx(alone["lr"], rel=1e-5), "warned": 1}
    assert alone["warned"] == 1
    assert 0.0 < alone["lr"] < 1e3


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp"])
@pytest.mark.parametrize("style", ["only_loss", "probe", "probe_and_loss"])
def test_looking_back_by_other_closures(run: Run, style: str, kind: str) -> None:
    ranks = run(functools.partial(rank_jobs.train_by, style, kind, 20, mode="lookback"))
    assert_like_one_process(ranks, rank_jobs.train_by(style, "plain", 20, mode="lookback"))


def test_ranks_that_were_given_no_loss_say_so_once(run: Run) -> None:
    without, given = (
        run(functools.partial(rank_jobs.train_by, style, "ddp", 20, mode="lookback"))[0]
        for style in ("probe", "probe_and_loss")
    )
    assert without["reductions"] == given["reductions"] > 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_a_step_that_led_one_rank_astray_is_taken_back_on_all(run: Run, bad: float, kind: str) -> None:
    ranks = run(rank_jobs.look_back_astray, kind, bad)
    for rank in ranks:
        assert rank["statuses"][6] == "REVERTED"
        rank.pop("losses")  # NaN is not equal to itself
    assert_alike(ranks)
    assert ranks[0]["is_back"]


@pytest.mark.parametrize(("kind", "size"), [("ddp", 2), ("fsdp", 2), ("hsdp", 4), ("tp", 2)])
@pytest.mark.parametrize("writes", [False, True])
def test_all_ranks_restart_or_none(run: Run, kind: str, size: int, writes: bool) -> None:
    ranks = run(rank_jobs.restart, kind, writes, size=size)
    assert_alike(ranks)
    statuses, losses = ranks[0]["burn_in"]["statuses"], ranks[0]["losses"]
    assert "REVERTED" in statuses
    assert (statuses[-1] == "RESTARTED") is not writes
    assert ranks[0]["is_back"] is not writes
    assert ranks[0]["has_state"] is writes
    assert losses[-1][0] < losses[0][0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_what_one_rank_does_not_know_of_its_gradients_all_look_up_half_way(run: Run, kind: str) -> None:
    ranks = run(rank_jobs.look_back_with_numbers, kind)
    assert_alike(ranks)
    assert ranks[0]["evaluated"][1:] == [2, 2, 2, 2, 2, 3, 3, 3, 2]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(("steps", "call"), [(4, 0), (4, 1)])
def test_an_exception_on_one_rank_ends_a_look_back_on_all(run: Run, kind: str, steps: int, call: int) -> None:
    ranks = run(functools.partial(rank_jobs.fail_on_one_rank, kind, steps, call, mode="lookback"))
    errors = [rank.pop("error") for rank in ranks]
    assert errors[0].startswith("RuntimeError: the step failed on 1 of 2 ranks")
    assert errors[1] == "KeyError: 'a bad example'"
    assert_alike(ranks)
    assert ranks[0]["step_calls"] == (3 if call else 2)  # one more where the first call was
    assert ranks[0]["has_moved"]


@pytest.mark.parametrize(("kind", "size"), [("ddp", 2), ("ddp", 4), ("tp", 2)])
def test_exact_mode(run: Run, kind: str, size: int) -> None:
    if kind == "tp" and torch.__version__ < "2.13":
        pytest.skip("refused before torch 2.13")
    options = {"mode": "exact", "make": "sgd"}
    alone = rank_jobs.train("plain", 100, **options)
    assert_like_one_process(run(functools.partial(rank_jobs.train, kind, 100, **options), size=size), alone)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp"])
@pytest.mark.parametrize("style", ["only_loss", "probe"])
def test_other_closures(run: Run, style: str, kind: str) -> None:
    ranks = run(rank_jobs.train_by, style, kind, 20)
    assert_like_one_process(ranks, rank_jobs.train_by(style, "plain", 20))


def test_gradients_of_the_caller_in_one_shard_are_used_on_all_ranks(run: Run) -> None:
    for rank in run(rank_jobs.gradients_of_one_rank, "fsdp"):
        assert rank["after"] == rank["before"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_that_the_caller_adds_are_used(run: Run, kind: str) -> None:
    for rank in run(rank_jobs.gradients_added_by_the_caller, kind):
        assert rank["after"] == rank["before"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(("steps", "call"), [(0, 0), (0, 3), (4, 0), (4, 1), (4, 2)])
def test_an_exception_on_one_rank_ends_the_step_on_all(run: Run, kind: str, steps: int, call: int) -> None:
    ranks = run(rank_jobs.fail_on_one_rank, kind, steps, call)
    errors = [rank.pop("error") for rank in ranks]
    assert errors[0].startswith("RuntimeError: the step failed on 1 of 2 ranks")
    assert errors[1] == "KeyError: 'a bad example'"
    assert_alike(ranks)  # at the end of the step, and after six more
    # The search reads after two calls, and a step after three; then all call where the first call was.
    assert ranks[0]["step_calls"] == (max(call + 1, 2) if steps == 0 else 3) + (call > 0)
    assert ranks[0]["has_moved"] is (steps > 0 or call > 0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("mode", ["lookback", "approximate"])
def test_an_exception_where_only_a_probe_goes_counts_as_an_infinite_loss_on_all(run: Run, kind: str, mode: str) -> None:
    ranks = run(functools.partial(rank_jobs.fail_where_only_a_probe_goes, kind, mode=mode))
    assert [rank.pop("warned") for rank in ranks] == [0, 1]  # told where it happened
    assert_alike(ranks)
    assert ranks[0]["is_infinite"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_training_goes_on_after_an_exception_within_the_model(run: Run, kind: str) -> None:
    ranks = run(rank_jobs.fail_within_the_model, kind)
    assert_alike(ranks)
    assert ranks[0]["losses"][-1][1] < ranks[0]["losses"][0][0]


@pytest.mark.parametrize("call", [0, 1, 2])
def test_an_exception_before_the_model_ends_the_step_on_all_where_calls_run_no_collectives(run: Run, call: int) -> None:
    ranks = run(rank_jobs.fail_before_the_model, call)
    assert [rank["error"] for rank in ranks] == ["RuntimeError", "KeyError"]
    assert [rank["calls"] for rank in ranks] == [3 + (call > 0)] * 2  # one more where the first call was


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_an_exception_before_the_backward_pass_is_raised_at_once(run: Run, kind: str) -> None:
    assert run(rank_jobs.fail_before_backward, kind) == [kind] * 2


def test_an_exception_in_exact_mode_ends_the_step_on_all(run: Run) -> None:
    ranks = run(functools.partial(rank_jobs.fail_on_one_rank, "ddp", 4, 1, mode="exact"))
    assert ranks[0].pop("error").startswith("RuntimeError: the step failed on 1 of 2 ranks")
    assert ranks[1].pop("error").startswith("KeyError")
    assert_alike(ranks)


def test_an_exception_in_the_base_on_one_rank_is_raised_on_all(run: Run) -> None:
    failed, other = run(rank_jobs.fail_in_the_base, "ddp")
    assert (failed["error"], failed["has_moved"]) == ("MemoryError", False)
    assert (other["error"], other["has_moved"]) == ("RuntimeError", True)
    assert failed["calls"] == other["calls"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("steps", "call", "status"),
    [
        (0, 0, "NON_FINITE_LOSS"),
        (0, 1, "NON_FINITE_LOSS"),
        (0, 2, "STARTED"),
        (4, 0, "NON_FINITE_LOSS"),
        (4, 2, "NON_FINITE_PROBE"),
    ],
)
def test_nan_on_one_rank_is_nan_on_all(run: Run, kind: str, steps: int, call: int, status: str) -> None:
    ranks = run(rank_jobs.nan_on_one_rank, kind, steps, call)
    assert ranks[0]["statuses"][steps] == status
    for rank in ranks:
        rank.pop("losses")  # NaN is not equal to itself
    assert_alike(ranks)


def test_a_plain_number_on_one_rank_is_judged_alike_on_all(run: Run) -> None:
    assert_alike(run(rank_jobs.return_numbers_on_one_rank))


def test_models_of_each_rank_are_not_coupled(run: Run) -> None:
    one, other = run(rank_jobs.train_apart, "local")
    assert not one["warnings"]
    assert not other["warnings"]
    assert one["losses"][0] != other["losses"][0]
    assert one["calls"] < other["calls"]


def test_processes_that_nothing_couples_are_told(run: Run) -> None:
    for rank in run(rank_jobs.train_apart, None):
        [warning] = rank["warnings"]
        assert "runs in 2 processes" in warning


def test_named_groups_are_coupled_within(run: Run) -> None:
    ranks = run(rank_jobs.train_in_named_groups, size=4)
    assert ranks[0] == ranks[1]
    assert ranks[2] == ranks[3]
    assert ranks[0]["losses"] != ranks[2]["losses"]
    assert {rank["copies"] for rank in ranks} == {(None, None)}


def test_groups_that_cannot_be_are_refused(run: Run) -> None:
    for mesh, other, mine, local in run(rank_jobs.wrong_groups):
        assert mesh.startswith("TypeError: process_group must be None, 'local' or a torch")
        assert "Of a DeviceMesh give mesh.get_group()" in mesh
        assert other.startswith("ValueError: process_group must be one that this process is a member of")
        for partly in (mine, local):
            assert partly.startswith("ValueError: process_group must hold all ranks that parameters are spread over")


@pytest.mark.parametrize("value", ["global", 3, True, [0, 1]])
def test_process_group_is_checked_without_processes(value: Any) -> None:
    with pytest.raises(TypeError, match="process_group must be None, 'local' or a torch"):
        gen_adamw(mlp().parameters(), process_group=value)


def test_local_survives_copies() -> None:
    optimizer = gen_adamw(mlp().parameters(), process_group="local")
    assert copy.deepcopy(optimizer).process_group == "local"
    assert pickle.loads(pickle.dumps(optimizer)).process_group == "local"


def test_uneven_batches_within_join_are_refused_in_a_probe_step_on_all_ranks(run: Run) -> None:
    one, other = run(rank_jobs.join_with_uneven_batches)
    assert one == other
    assert "cannot measure the loss within DistributedDataParallel.join()" in one


def test_exact_mode_is_refused_under_tensor_parallelism_before_torch_2_13(run: Run) -> None:
    [error, other] = run(rank_jobs.exact_with_an_older_torch)
    assert error == other
    assert "mode='exact' needs torch 2.13 or newer under tensor parallelism, but this is torch 2.12.1" in error


def test_exact_mode_is_refused_under_fully_shard(run: Run) -> None:
    with pytest.raises(FailedError, match="differentiates the loss twice, which fully_shard does not support"):
        run(functools.partial(rank_jobs.train, "fsdp", 1, mode="exact"))


def test_the_older_fsdp_is_refused(run: Run) -> None:
    if not torch.cuda.is_available():
        pytest.skip("FullyShardedDataParallel needs an accelerator: no CUDA device here")
    with pytest.raises(FailedError, match="Apply fully_shard to the model instead"):
        run(rank_jobs.older_fsdp)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp"])
@pytest.mark.parametrize(("mode", "probes_a_step"), [("lookback", 1), ("approximate", 2)])
def test_probes_run_the_collectives_of_a_forward_pass_and_one_reduction(
    run: Run, mode: str, probes_a_step: int, kind: str
) -> None:
    counts, others = run(rank_jobs.count_collectives, kind, mode)
    assert others == counts
    [forward] = map(Counter, counts["forward"])
    assert forward
    seen = []
    for bare, wrapped, is_probed in zip(counts["bare"], counts["wrapped"], counts["is_probed"], strict=True):
        times = int(is_probed) * (1 if any(seen) else 2)  # the first probe step evaluates the loss again, to compare
        probes = Counter(allreduce=times)
        for _ in range(probes_a_step + times - 1 if is_probed else 0):
            probes += forward
        assert Counter(wrapped) == Counter(bare) + probes
        seen.append(is_probed)
    assert 2 <= sum(seen) < len(seen)


@pytest.mark.parametrize("evaluates", [False, True])
def test_probes_see_the_buffers_that_ddp_sends_around(run: Run, evaluates: bool) -> None:
    ranks = run(rank_jobs.buffers_under_ddp, evaluates)
    for rank, result in enumerate(ranks):
        assert result["here"] == ranks[0]["here"]
        assert result["here"] == pytest.approx(result["first"], rel=1e-14)
        own = rank if evaluates else 0
        assert result["seen"] == [(1.0 + own, True), (2.0 + own, True), (3.0 + own, True)]


@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph", "gradient_as_bucket_view"])
def test_options_of_ddp(run: Run, option: str) -> None:
    ranks = run(rank_jobs.train, "ddp", 20, {option: True})
    assert_like_one_process(ranks, rank_jobs.train("plain", 20))


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}])
def test_losses_that_differentiate_under_ddp(run: Run, options: dict[str, Any]) -> None:
    ranks = run(functools.partial(rank_jobs.gradient_penalty, **options))
    assert_alike(ranks)
    assert ranks[0]["losses"][-1][0] < ranks[0]["losses"][0][0]
    assert ranks[0]["awaits_backward"] == {(False, True), (True, False)}
    assert not any(ranks[0]["reductions"])
    assert len(ranks[0]["reductions"]) == 20


def test_parameters_are_sharded_after_every_step(run: Run) -> None:
    assert run(rank_jobs.parameters_after_steps) == [["DTensor"]] * 2


@pytest.mark.parametrize("size", [2, 4])
def test_inner_products_of_shards_are_reduced_once(run: Run, size: int) -> None:
    for rank in run(rank_jobs.inner_products, size=size):
        assert len(rank) >= 10
        for found, expected in rank:
            assert found == pytest.approx(expected, rel=1e-14)


def test_without_processes_a_mean_is_the_number() -> None:
    ranks = Ranks()
    assert len(ranks) == 1
    assert ranks.mean([1.5, torch.tensor(2.0)]) == [1.5, 2.0]
    with pytest.raises(KeyError):
        ranks.attempt(lambda: {}["nothing"], instead=0.0)
    assert not ranks.keep(KeyError())


@pytest.mark.parametrize(
    ("kind", "through", "mode", "steps"),
    [
        *((kind, "dcp", "lookback", 13) for kind in ("ddp", "fsdp", "hsdp", "fsdp_and_tp")),
        *((kind, "dcp", "approximate", 13) for kind in ("ddp", "fsdp")),
        *((kind, "dcp", "lookback", 15) for kind in ("ddp", "fsdp", "hsdp", "fsdp_and_tp")),
        *((kind, "torch.save", mode, 15) for kind in ("ddp", "fsdp") for mode in ("approximate", "lookback")),
    ],
)
def test_training_resumes_bit_for_bit_from_a_checkpoint(
    run: Run, kind: str, through: str, mode: str, steps: int, tmp_path: Path
) -> None:
    saved = run(rank_jobs.save, kind, str(tmp_path), through, mode, steps, size=4)
    assert_alike(saved)
    assert saved[0]["looks_back"] is (mode == "lookback" and steps == 15)
    resumed = run(rank_jobs.resume, kind, str(tmp_path), through, mode, size=4)
    assert_alike(resumed)
    assert resumed[0]["parameters"] == saved[0]["parameters"]
    assert resumed[0]["lrs"] == saved[0]["lrs"][-len(resumed[0]["lrs"]) :]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("mode", ["approximate", "lookback"])
def test_four_ranks_resume_as_two(run: Run, mode: str, kind: str, tmp_path: Path) -> None:
    saved = run(rank_jobs.save, kind, str(tmp_path), "dcp", mode, 13, size=4)
    resumed = run(rank_jobs.resume, kind, str(tmp_path), "dcp", mode, size=2)
    assert_alike(resumed)
    assert distance(resumed[0]["parameters"], saved[0]["parameters"]) < 1e-5
    assert resumed[0]["lrs"] == pytest.approx(saved[0]["lrs"][-len(resumed[0]["lrs"]) :], rel=1e-5)


@pytest.mark.parametrize("is_bare", [True, False])
@pytest.mark.parametrize(
    ("is_warm", "options", "is_exact"),
    [(False, {}, False), (True, {}, True), (False, {"find_unused_parameters": True}, True)],
)
def test_resuming_under_ddp_is_as_exact_as_its_buckets_are_alike(
    pool: Pool, is_warm: bool, options: dict[str, Any], is_exact: bool, is_bare: bool
) -> None:
    """It lays out its buckets anew after the first backward pass, unless it looks for unused parameters.

    A sum over four ranks is added up in an order that depends on the place in the bucket: the first step of the
    resumed run has other bits than that of the whole one, with the bare base optimizer as with ours.
    """
    job = functools.partial(rank_jobs.resume_in_buckets, is_bare, is_warm, **options)
    ranks = pool.run(job, size=4)
    assert_alike(ranks)
    whole, resumed = ranks[0]
    if is_exact:
        assert resumed == whole
    else:
        assert distance(resumed, whole) < 1e-13  # on some processors the bits are the same


def test_the_script_of_the_documentation_runs(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(documentation.script_of("distributed.md"), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    torchrun += ["--redirects=1", "--log-dir=logs", "train.py"]  # in a file a rank: lines of several would mix
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        torchrun, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("stdout.log"))
    found = re.findall(r"rank (\d), epoch (\d): its loss (\S+), learning rate (\S+)", printed)
    assert len(found) == 20
    rates = {rank: [rate for other, _, _, rate in sorted(found) if other == rank] for rank in "01"}
    assert rates["0"] == rates["1"]
    losses = [float(loss) for _, epoch, loss, _ in found if epoch == "9"]
    assert max(losses) < 0.1
