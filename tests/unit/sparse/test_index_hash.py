"""The index hash tells index sets apart and nothing else."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch

from sparse_ds.sparse.index_hash import hash_indices

A, B = torch.tensor([1, 5, 9]), torch.tensor([0, 2])


def test_hash_is_the_documented_one() -> None:
    def digest(name: str, indices: list[int]) -> bytes:
        return hashlib.sha256(
            f"{name}\0{len(indices)}\0".encode() + struct.pack(f"<{len(indices)}q", *indices)
        ).digest()

    expected = hashlib.sha256(digest("a", [1, 5, 9]) + digest("b", [0, 2])).hexdigest()
    assert hash_indices([("a", A), ("b", B)]) == expected


def test_order_of_the_tensors_and_integer_type_do_not_matter() -> None:
    assert hash_indices([("a", A), ("b", B)]) == hash_indices(iter([("b", B.int()), ("a", A.int())]))


@pytest.mark.parametrize(
    "other",
    [
        [("a", torch.tensor([1, 5, 8])), ("b", B)],  # another index
        [("a", torch.tensor([1, 5])), ("b", B)],  # one fewer
        [("b", A), ("a", B)],  # names exchanged
        [("a", A)],  # a tensor fewer
        [("a", A), ("b", torch.tensor([], dtype=torch.int64))],  # an empty tensor
    ],
)
def test_any_change_of_the_sets_changes_the_hash(other: list[tuple[str, torch.Tensor]]) -> None:
    assert hash_indices(other) != hash_indices([("a", A), ("b", B)])


def test_a_strided_view_hashes_like_its_copy() -> None:
    wide = torch.arange(20)
    assert hash_indices([("a", wide[::2])]) == hash_indices([("a", wide[::2].contiguous())])


@pytest.mark.parametrize("indices", [torch.tensor([2, 1]), torch.tensor([1, 1]), torch.tensor([[1, 2]])])
def test_indices_out_of_order_are_a_broken_invariant(indices: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match=r"^a: indices"):
        hash_indices([("a", indices)])
