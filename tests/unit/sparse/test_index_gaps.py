"""Indices as gaps of variable length: the inverse, the size, and every kind of damage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_ds.sparse.index_gaps import decode_gaps, encode_gaps


def leb128(number: int) -> list[int]:
    """The oracle, one number at a time (DWARF standard, section 7.6)."""
    encoded = []
    while True:
        number, digits = divmod(number, 128)
        if number == 0:
            return [*encoded, digits]
        encoded.append(digits + 128)


@given(st.sets(st.integers(0, 2**40), max_size=50))
def test_gaps_are_leb128_and_come_back(numbers: set[int]) -> None:
    indices = sorted(numbers)
    encoded = encode_gaps(torch.tensor(indices, dtype=torch.int64))
    before = [-1, *indices[:-1]]
    expected = [byte for left, right in zip(before, indices, strict=False) for byte in leb128(right - left - 1)]
    assert encoded.dtype == torch.uint8 and encoded.tolist() == expected
    assert decode_gaps(encoded).tolist() == indices


def test_about_one_byte_at_the_usual_density() -> None:
    indices = torch.randperm(400_000, generator=torch.Generator().manual_seed(0))[:10_000].sort().values.int()
    encoded = encode_gaps(indices)
    assert encoded.numel() < 1.06 * indices.numel()
    assert torch.equal(decode_gaps(encoded), indices.long())
    everything = torch.arange(1000, dtype=torch.int32)
    assert encode_gaps(everything).tolist() == [0] * 1000


@pytest.mark.parametrize(
    ("encoded", "message"), [([1, 128], "the last gap is cut off"), ([*[255] * 7, 1], "a gap of 8 bytes, expected at")]
)
def test_damaged_bytes(encoded: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_gaps(torch.tensor(encoded, dtype=torch.uint8))
