"""Best-fit decreasing, against the plain way to write it down."""

from __future__ import annotations

import numpy as np
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from sparse_ds.data.packing import PackedDataset, pack, sample_lengths

ROW = 16
LENGTHS = st.lists(st.integers(1, ROW), max_size=60)


def fills_by_hand(lengths: list[int]) -> list[int]:
    """Tokens of every row: each sample, longest first, into the fullest row that holds it."""
    fills: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, fill in enumerate(fills) if fill + length <= ROW]
        if fitting:
            fills[max(fitting, key=lambda row: fills[row])] += length
        else:
            fills.append(length)
    return sorted(fills)


def rows_of(lengths: list[int], order: list[int] | None = None) -> list[list[int]]:
    packing = pack(lengths, ROW, range(len(lengths)) if order is None else order)
    return [packing.samples_of(row) for row in range(len(packing))]


@given(LENGTHS, st.randoms(use_true_random=False))
def test_every_sample_once_and_rows_as_full_as_best_fit_decreasing_makes_them(
    lengths: list[int], random: object
) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)  # type: ignore[attr-defined]
    rows = rows_of(lengths, order)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert sorted(sum(lengths[sample] for sample in row) for row in rows) == fills_by_hand(lengths)


def test_golden_rows() -> None:
    # 10 + 6, 9 + 7, 8 + 5 + 2 (the 2 has a room of exactly 3 and none of 2); the 4 fits nowhere else.
    assert rows_of([8, 9, 10, 7, 6, 5, 4, 2]) == [[2, 4], [1, 3], [0, 5, 7], [6]]


def test_the_order_decides_between_samples_of_the_same_length() -> None:
    assert rows_of([8, 8, 8, 8], [3, 0, 2, 1]) == [[3, 0], [2, 1]]
    assert rows_of([8, 8, 8, 8], [0, 1, 2, 3]) == [[0, 1], [2, 3]]


def test_a_hundred_thousand_samples_in_a_second_or_so() -> None:
    generator = np.random.default_rng(0)
    lengths = np.minimum(2048, generator.lognormal(5, 1, 100_000).astype(int) + 2)
    packing = pack(lengths, 2048, generator.permutation(len(lengths)))
    assert np.array_equal(np.sort(packing.samples), np.arange(len(lengths)))
    fills = np.add.reduceat(lengths[packing.samples], packing.starts[:-1])
    assert fills.max() <= 2048 and lengths.sum() / (len(packing) * 2048) > 0.999


def samples(*lengths: int) -> Dataset:
    ids = [[10 * number + place for place in range(length)] for number, length in enumerate(lengths)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, *one[1:]] for one in ids]})


def test_rows_of_a_data_set() -> None:
    packed = PackedDataset(samples(3, 5, 4, 2), 8, [0, 1, 2, 3])
    assert len(packed) == 2
    assert packed[0] == {
        "input_ids": [[10, 11, 12, 13, 14], [0, 1, 2]],
        "labels": [[-100, 11, 12, 13, 14], [-100, 1, 2]],
    }
    assert packed[1]["input_ids"] == [[20, 21, 22, 23], [30, 31]]
    assert packed.describe() == "4 samples packed into 2 rows of 8 tokens (2.0 a row), 87.5% full"


def test_lengths_of_a_selection() -> None:
    assert sample_lengths(samples(3, 5, 4).select([2, 0])).tolist() == [4, 3]


def test_fingerprint_tells_samples_and_rows_apart() -> None:
    first = PackedDataset(samples(4, 4, 4, 4), 8, [0, 1, 2, 3]).fingerprint()
    assert first == PackedDataset(samples(4, 4, 4, 4), 8, [0, 1, 2, 3]).fingerprint()
    others = {
        PackedDataset(samples(4, 4, 4, 4), 8, [0, 2, 1, 3]).fingerprint(),
        PackedDataset(samples(4, 4, 4, 4), 12, [0, 1, 2, 3]).fingerprint(),
        PackedDataset(samples(4, 4, 4, 3), 8, [0, 1, 2, 3]).fingerprint(),
    }
    assert len({first, *others}) == 4
