"""Padding goes by length, so that EOS may pad without being masked where it is meant."""

from __future__ import annotations

import pytest
import torch

from sparse_ds.config.errors import UserError
from sparse_ds.data import CausalCollator, PackedCollator

EOS = 2
SAMPLES = [
    {"input_ids": [1, 7, 8, EOS], "labels": [-100, -100, 8, EOS]},
    {"input_ids": [1, EOS], "labels": [-100, EOS]},
]


def test_golden_batch_with_eos_as_padding() -> None:
    batch = CausalCollator(pad_token_id=EOS, pad_to_multiple_of=5)(SAMPLES)
    assert batch["input_ids"].tolist() == [[1, 7, 8, EOS, EOS], [1, EOS, EOS, EOS, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 8, EOS, -100], [-100, EOS, -100, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("multiple", "longest", "expected"), [(1, 3, 3), (8, 1, 8), (8, 8, 8), (8, 9, 16)])
def test_width(multiple: int, longest: int, expected: int) -> None:
    ids = list(range(longest))
    batch = CausalCollator(0, multiple)([{"input_ids": ids, "labels": ids}])
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(1, expected)}
    assert int(batch["attention_mask"].sum()) == longest


def test_multiple_below_one() -> None:
    with pytest.raises(UserError, match="pad_to_multiple_of is 0"):
        CausalCollator(0, 0)


ROWS = [
    {"input_ids": [[7, 8, EOS], [4, EOS]], "labels": [[7, 8, EOS], [-100, EOS]]},
    {"input_ids": [[5, 6, 9, 9, 9, EOS]], "labels": [[-100, -100, 9, 9, 9, EOS]]},
]


def test_golden_packed_rows() -> None:
    batch = PackedCollator(pad_token_id=0)(ROWS)
    assert batch.keys() == {"input_ids", "position_ids", "labels", "sample_lengths"}, "a mask would hide the packing"
    assert batch["input_ids"].tolist() == [[7, 8, EOS, 4, EOS, 0, 0, 0], [5, 6, 9, 9, 9, EOS, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 1]]
    assert batch["labels"].tolist() == [
        [-100, 8, EOS, -100, EOS, -100, -100, -100],
        [-100, -100, 9, 9, 9, EOS, -100, -100],
    ]
    assert batch["sample_lengths"].tolist() == [3, 2, 6]


def test_golden_joined_rows() -> None:
    batch = PackedCollator(pad_token_id=0, joins_rows=True)(ROWS)
    assert batch["input_ids"].tolist() == [[7, 8, EOS, 4, EOS, 5, 6, 9, 9, 9, EOS]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [[-100, 8, EOS, -100, EOS, -100, -100, 9, 9, 9, EOS]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 11]
    assert batch["max_length_q"] == batch["max_length_k"] == 6
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["input_ids"].dtype == torch.int64
    assert batch["sample_lengths"].tolist() == [3, 2, 6] and "attention_mask" not in batch
