import csv
import json
import math
import pickle
from dataclasses import MISSING, FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_optim.records import History, ProbeRecord
from gen_optim.rules import ProbeStatus

RECORD = ProbeRecord(
    step=9,
    multiples=(-1.0, 0.0, 1.0),
    losses=(4.0, 1.0, 0.0),
    slope=2.0,
    curvature=2.0,
    optimal_lr=1.0,
    lr_before=0.5,
    lr_after=0.55,
    factor=1.0,
    status=ProbeStatus.FITTED,
)

numbers = st.floats(allow_nan=False)  # NaN equals nothing; it has a test of its own
records = st.builds(
    ProbeRecord,
    step=st.integers(1, 10**9),
    multiples=st.lists(numbers).map(tuple),
    losses=st.lists(numbers).map(tuple),
    slope=numbers,
    curvature=numbers,
    optimal_lr=st.none() | numbers,
    lr_before=numbers,
    lr_after=numbers,
    factor=numbers,
    status=st.sampled_from(ProbeStatus),
)


@given(records)
def test_record_survives_json(record: ProbeRecord) -> None:
    assert ProbeRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


@given(records)
def test_record_survives_pickle(record: ProbeRecord) -> None:
    assert pickle.loads(pickle.dumps(record)) == record


def test_record_with_nan_survives_json() -> None:
    record = replace(RECORD, losses=(math.nan, 1.0, math.inf), slope=math.nan, optimal_lr=None)
    restored = ProbeRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    assert math.isnan(restored.losses[0])
    assert restored.losses[1:] == (1.0, math.inf)
    assert math.isnan(restored.slope)
    assert restored.optimal_lr is None


def test_record_as_a_dictionary_is_plain() -> None:
    assert RECORD.to_dict() == {
        "step": 9,
        "multiples": [-1.0, 0.0, 1.0],
        "losses": [4.0, 1.0, 0.0],
        "slope": 2.0,
        "curvature": 2.0,
        "optimal_lr": 1.0,
        "lr_before": 0.5,
        "lr_after": 0.55,
        "factor": 1.0,
        "status": "fitted",
        "slope_noise": 0.0,
        "curvature_noise": 0.0,
        "loss_end": None,
        "excess_loss": None,
    }


def test_making_a_record_leaves_the_dictionary_alone() -> None:
    values = RECORD.to_dict()
    ProbeRecord.from_dict(values)
    assert values == RECORD.to_dict()


def test_record_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        RECORD.step = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", [field.name for field in fields(ProbeRecord) if field.default is MISSING])
def test_missing_field_is_named(name: str) -> None:
    values = RECORD.to_dict()
    del values[name]
    with pytest.raises(TypeError, match=name):
        ProbeRecord.from_dict(values)


def test_fields_that_records_did_not_have_at_first_may_be_missing() -> None:
    values = RECORD.to_dict()
    for name in ("slope_noise", "curvature_noise", "loss_end"):
        del values[name]
    assert ProbeRecord.from_dict(values) == RECORD


def test_unknown_field_is_named() -> None:
    with pytest.raises(TypeError, match="colour"):
        ProbeRecord.from_dict(RECORD.to_dict() | {"colour": "blue"})


def test_unknown_status_is_named() -> None:
    with pytest.raises(ValueError, match="sleepy"):
        ProbeRecord.from_dict(RECORD.to_dict() | {"status": "sleepy"})


def test_statuses_are_told_apart_by_their_values() -> None:
    assert [ProbeStatus(status.value) for status in ProbeStatus] == list(ProbeStatus)


def test_the_loss_is_that_where_the_step_began() -> None:
    assert RECORD.loss == 1.0
    assert replace(RECORD, loss_end=0.25).loss == 0.25
    assert math.isnan(replace(RECORD, multiples=(1.0, 2.0, 3.0)).loss)


LOOKED_BACK = {"loss_end": 0.75, "lr_after": 0.5, "factor": 0.25}
BEHIND = {"status": ProbeStatus.NO_MINIMUM, "optimal_lr": -0.5}
NO_MINIMUM = {"status": ProbeStatus.NO_MINIMUM, "optimal_lr": None}
STARTED = {"status": ProbeStatus.STARTED, "slope": math.nan}
NON_FINITE = {"status": ProbeStatus.NON_FINITE_LOSS, "losses": (1, math.nan, 1), "slope": math.nan, "optimal_lr": None}


@pytest.mark.parametrize(
    ("changes", "losses", "lowest", "rate"),
    [
        ({}, "(fitted): the loss is 1", "the parabola is lowest at 1", "goes from 0.5 to 0.55."),
        (
            LOOKED_BACK,
            "(fitted): the last step took the loss from 1 to 0.75",
            "the parabola is lowest at 1",
            "stays at 0.5, times the scheduler's factor 0.25.",
        ),
        (
            {"status": ProbeStatus.NO_MINIMUM},
            "(no minimum): the loss is 1",
            "this parabola alone is lowest at 1",
            "goes from 0.5 to 0.55.",
        ),
        (NO_MINIMUM, "(no minimum): the loss is 1", "the parabola has no lowest point", "goes from 0.5 to 0.55."),
        (
            BEHIND,
            "(no minimum): the loss is 1",
            "the parabola is lowest behind where the step began",
            "goes from 0.5 to 0.55.",
        ),
        (STARTED, "(started): the loss is 1", "it is lowest at 1", "goes from 0.5 to 0.55."),
        (NON_FINITE, "(non finite loss): the loss is nan", "no lowest point was found", "goes from 0.5 to 0.55."),
    ],
)
def test_a_record_is_printed_as_a_sentence(changes: dict[str, Any], losses: str, lowest: str, rate: str) -> None:
    assert str(replace(RECORD, **changes)) == f"Step 9 {losses}, {lowest}, and the learning rate {rate}"


def history_of(*of: ProbeRecord) -> History:
    history = History()
    for record in of:
        history(object(), record)
    return history


def test_history_holds_records_in_order() -> None:
    second = replace(RECORD, step=17)
    history = history_of(RECORD, second)
    assert len(history) == 2
    assert list(history) == [RECORD, second]
    assert history[0] is RECORD
    assert history[-1] is second


def test_columns_are_numbers_with_nan_for_none() -> None:
    history = history_of(RECORD, replace(RECORD, step=17, optimal_lr=None, lr_after=0.6))
    np.testing.assert_array_equal(history.column("step"), [9.0, 17.0])
    np.testing.assert_array_equal(history.column("lr_after"), [0.55, 0.6])
    np.testing.assert_array_equal(history.column("optimal_lr"), [1.0, np.nan])
    assert history.column("step").dtype == np.float64


@pytest.mark.parametrize("name", ["step", "slope", "curvature", "optimal_lr", "lr_before", "lr_after", "factor"])
def test_columns_of_an_empty_history_are_empty(name: str) -> None:
    column = History().column(name)
    assert column.shape == (0,)
    assert column.dtype == np.float64


def test_columns_of_a_data_frame() -> None:
    columns = history_of(RECORD, replace(RECORD, step=17, optimal_lr=None, loss_end=0.5)).columns()
    assert list(columns) == [
        *("step", "status", "loss", "slope", "curvature", "optimal_lr", "lr_before", "lr_after", "factor"),
        *("slope_noise", "curvature_noise", "loss_end", "excess_loss"),
    ]
    assert columns["step"] == [9, 17]
    assert columns["status"] == ["fitted", "fitted"]
    assert columns["loss"] == [1.0, 0.5]
    assert columns["optimal_lr"] == [1.0, pytest.approx(math.nan, nan_ok=True)]
    assert columns["loss_end"] == [pytest.approx(math.nan, nan_ok=True), 0.5]


def test_every_number_of_a_record_is_in_the_columns() -> None:
    assert set(History().columns()) == {each.name for each in fields(ProbeRecord)} - {"multiples", "losses"} | {"loss"}


def test_csv_is_read_back_as_it_was(tmp_path: Path) -> None:
    history = history_of(RECORD, replace(RECORD, step=17, optimal_lr=None, curvature=1.0 / 3.0))
    history.save_csv(tmp_path / "history.csv")
    with (tmp_path / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(history.columns())
    assert [row["status"] for row in rows] == ["fitted", "fitted"]
    assert [float(row["curvature"]) for row in rows] == [2.0, 1.0 / 3.0]
    assert math.isnan(float(rows[1]["optimal_lr"]))


def test_unknown_column_is_refused() -> None:
    with pytest.raises(AttributeError, match="colour"):
        history_of(RECORD).column("colour")


def test_history_survives_json() -> None:
    history = history_of(RECORD, replace(RECORD, step=17, optimal_lr=None, status=ProbeStatus.CONCAVE))
    lines = json.loads(json.dumps(history.to_dicts()))
    assert [ProbeRecord.from_dict(line) for line in lines] == history.records


def test_histories_share_nothing() -> None:
    first, second = history_of(RECORD), History()
    assert len(first) == 1
    assert len(second) == 0


@pytest.mark.parametrize("name", ["status", "losses", "lr"])
def test_a_column_that_is_no_number_is_refused_with_the_names_of_those_that_are(name: str) -> None:
    with pytest.raises(AttributeError, match=f"one of step, loss, slope, .*, got {name!r}; columns"):
        History().column(name)
