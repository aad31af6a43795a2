"""What ends a step that something has interrupted."""

from __future__ import annotations

import pytest

from gen_optim.tensors.interrupts import Unfinished


def test_all_calls_that_are_left_are_made_the_last_one_first_even_if_one_fails() -> None:
    made, unfinished = [], Unfinished()

    def fail() -> None:
        made.append("fails")
        raise ZeroDivisionError

    for call in (lambda: made.append("first"), fail, lambda: made.append("last")):
        unfinished.add(call)
    with pytest.raises(ZeroDivisionError):
        unfinished.finish()
    assert made == ["last", "fails", "first"]
    unfinished.finish()
    assert len(made) == 3, "nothing is left"
