"""Padding goes by length, so that EOS may pad without being masked where it is meant."""

from __future__ import annotations

import pytest
import torch

from sparse_ds.config.errors import UserError
from sparse_ds.data import CausalCollator

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
