"""The coalesced buffer of row and column statistics."""

from __future__ import annotations

import pytest
import torch

from sparse_ds.optim.row_col_accumulators import RowColAccumulators

CPU = torch.device("cpu")


def filled() -> RowColAccumulators:
    accumulators = RowColAccumulators()
    accumulators.add({"a": (2, 3)}, CPU)
    accumulators.pending.copy_(torch.arange(5.0))
    accumulators.commit()
    return accumulators


def test_layout_is_rows_then_cols_in_order_of_addition() -> None:
    accumulators = filled()
    accumulators.add({"a": (2, 3), "b": (1, 2)}, CPU)
    assert accumulators.shapes == {"a": (2, 3), "b": (1, 2)}
    assert accumulators.committed.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert accumulators.pending.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    row, col = accumulators.split("b", accumulators.pending)
    row.fill_(7)
    col.fill_(8)
    assert accumulators.pending.tolist() == [0, 1, 2, 3, 4, 7, 8, 8]
    assert accumulators.committed.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]


def test_pending_and_committed_are_separate_from_the_start() -> None:
    accumulators = RowColAccumulators()
    accumulators.add({"a": (1, 1)}, CPU)
    accumulators.pending.fill_(3)
    assert accumulators.committed.tolist() == [0, 0]


def test_state_goes_by_name_not_by_order() -> None:
    saved = filled()
    saved.add({"b": (1, 1)}, CPU)
    other = RowColAccumulators()
    other.add({"b": (1, 1), "a": (2, 3)}, CPU)
    other.load_state_dict(saved.state_dict())
    assert other.committed.tolist() == [0, 0, 0, 1, 2, 3, 4]
    assert other.pending.tolist() == other.committed.tolist()


def test_state_is_a_copy() -> None:
    accumulators = filled()
    state = accumulators.state_dict()
    accumulators.committed.zero_()
    assert state["a"][1].tolist() == [2, 3, 4]


@pytest.mark.parametrize("shapes", [{"a": (3, 2)}, {"b": (2, 3)}, {"a": (2, 3), "b": (1, 1)}])
def test_state_of_other_tensors_is_refused(shapes: dict[str, tuple[int, int]]) -> None:
    other = RowColAccumulators()
    other.add(shapes, CPU)
    with pytest.raises(RuntimeError, match="saved accumulators do not fit"):
        other.load_state_dict(filled().state_dict())


def test_another_shape_under_the_same_name_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"'a': registered as \(2, 3\), now \(3, 2\)"):
        filled().add({"a": (3, 2)}, CPU)


def test_another_device_is_refused() -> None:
    with pytest.raises(RuntimeError, match="must be on the same device"):
        filled().add({"b": (1, 1)}, torch.device("meta"))
