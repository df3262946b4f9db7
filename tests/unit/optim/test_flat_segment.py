"""What a flat segment accepts, and the positions it yields."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparse_ds.optim.flat_segment import FlatSegment

CPU = torch.device("cpu")


def test_positions_of_a_sparse_segment_follow_its_indices() -> None:
    indices = torch.tensor([1, 5, 8], dtype=torch.int32)
    segment = FlatSegment("w", offset=4, length=3, num_rows=3, num_cols=3, indices=indices)
    assert segment.positions(1, 3, CPU).tolist() == [5, 8]
    indices[1] = 4
    assert segment.positions(1, 3, CPU).tolist() == [4, 8]
    segment.indices = torch.tensor([0, 2, 3])
    assert segment.positions(0, 3, CPU).tolist() == [0, 2, 3]


def test_positions_of_a_dense_segment_are_consecutive() -> None:
    segment = FlatSegment("head", offset=0, length=4, num_rows=3, num_cols=5, start=7)
    assert segment.positions(1, 4, CPU).tolist() == [8, 9, 10]


def test_indices_of_another_length_are_refused() -> None:
    segment = FlatSegment("w", offset=0, length=3, num_rows=3, num_cols=3, indices=torch.tensor([1, 5, 8]))
    segment.indices = torch.tensor([1, 5])
    with pytest.raises(AssertionError, match="'w': 2 indices for 3 values"):
        segment.positions(0, 2, CPU)


GOOD: dict[str, Any] = {"name": "w", "offset": 2, "length": 3, "num_rows": 3, "num_cols": 3}
SPARSE = {**GOOD, "indices": torch.tensor([1, 5, 8])}


@pytest.mark.parametrize("arguments", [GOOD, SPARSE, {**GOOD, "length": 0}, {**GOOD, "start": 6}])
def test_good_segments_pass(arguments: dict[str, Any]) -> None:
    FlatSegment(**arguments).check(5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({**GOOD, "num_cols": 0}, "shape 3 x 0"),
        ({**GOOD, "offset": 3}, r"\[3, 6\) is outside of a flat tensor of 5"),
        ({**GOOD, "offset": -1}, r"\[-1, 2\) is outside"),
        ({**GOOD, "start": 7}, r"\[7, 10\) is outside of a tensor of 9"),
        ({**SPARSE, "start": 1}, "belongs to dense segments"),
        ({**SPARSE, "indices": torch.tensor([1, 5])}, r"indices \(2,\) for 3 values"),
        ({**SPARSE, "indices": torch.tensor([1.0, 5.0, 8.0])}, r"torch\.float32 indices"),
        ({**SPARSE, "indices": torch.tensor([1, 5, 9])}, r"indices outside of 0 \.\. 8"),
        ({**SPARSE, "indices": torch.tensor([-1, 5, 8])}, r"indices outside of 0 \.\. 8"),
    ],
)
def test_bad_segments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        FlatSegment(**arguments).check(5)
