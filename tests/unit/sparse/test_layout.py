"""Flat indices to rows and columns."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from sparse_ds.sparse.layout import SparseLayout, num_active_weights


def test_rows_and_columns_rebuild_the_indices() -> None:
    layout = SparseLayout(7, 5, 35)
    indices = torch.arange(35, dtype=torch.int32)
    rows, cols = layout.rows_of(indices), layout.cols_of(indices)
    assert rows.dtype == cols.dtype == torch.int32
    assert torch.equal(rows * 5 + cols, indices)
    assert torch.equal(torch.zeros(7, 5).index_put((rows.long(), cols.long()), torch.ones(())), torch.ones(7, 5))


@pytest.mark.parametrize(("num_rows", "dtype"), [(2**16, torch.int64), (2**16 - 1, torch.int32)])
def test_indices_are_64_bit_from_2_to_the_31_weights(num_rows: int, dtype: torch.dtype) -> None:
    assert SparseLayout(num_rows, 2**15, 1).index_dtype == dtype


@pytest.mark.parametrize("rows_per_block", [1, 2, 3, 7, 100])
def test_boundaries_cut_the_indices_by_blocks_of_rows(rows_per_block: int) -> None:
    layout = SparseLayout(7, 5, 6)
    indices = torch.tensor([0, 4, 5, 17, 18, 34], dtype=torch.int32)
    boundaries = layout.row_boundaries(indices, rows_per_block)
    blocks = [indices[begin:end].tolist() for begin, end in pairwise(boundaries)]
    expected = [
        [i for i in indices.tolist() if first <= i // 5 < first + rows_per_block]
        for first in range(0, 7, rows_per_block)
    ]
    assert blocks == expected


def test_slots_are_the_active_weights_and_the_room_for_more() -> None:
    assert (SparseLayout(4, 3, 5).num_slots, SparseLayout(4, 3, 5, spare_slots=2).num_slots) == (5, 7)
    assert SparseLayout(4, 3, 5) == SparseLayout(4, 3, 5, spare_slots=0)


def test_boundaries_of_no_indices() -> None:
    assert SparseLayout(4, 3, 0).row_boundaries(torch.empty(0, dtype=torch.int32), 3) == [0, 0, 0]


@pytest.mark.parametrize(
    ("density", "num_elements", "expected"),
    [
        (0.29, 100, 29),
        (0.1, 10, 1),
        (0.07, 100, 7),
        (1.0, 13, 13),
        (1e-05, 99_999, 0),
        (1e-05, 100_000, 1),
        (0.5, 3, 1),
    ],
)
def test_number_of_active_weights_is_exact_for_the_decimal(density: float, num_elements: int, expected: int) -> None:
    assert num_active_weights(density, num_elements) == expected


BLOCKS = [(1, 1), (1, 4), (3, 1), (2, 3), (6, 8)]


def grid_positions(layout: SparseLayout) -> torch.Tensor:
    """[O, I] index of the block that each weight is in, weight by weight."""
    grid_cols = layout.num_cols // layout.block_cols
    return torch.tensor(
        [
            [row // layout.block_rows * grid_cols + col // layout.block_cols for col in range(layout.num_cols)]
            for row in range(layout.num_rows)
        ]
    )


@pytest.mark.parametrize("block", BLOCKS)
def test_weights_of_blocks(block: tuple[int, int]) -> None:
    layout = SparseLayout(6, 24, 0, block_rows=block[0], block_cols=block[1])
    chosen = torch.arange(layout.num_positions, dtype=torch.int32)[::2]
    expected = [(grid_positions(layout).view(-1) == index).nonzero().view(-1) for index in chosen.tolist()]
    assert torch.equal(layout.weights_of(chosen).long(), torch.cat(expected))
    strips = layout.strips_of(chosen)
    assert torch.equal(torch.arange(6 * 24).view(-1, block[1])[strips.long()].view(-1), torch.cat(expected))
    numbers = torch.arange(chosen.numel() * layout.block_elements)
    positions, reordered = layout.sorted_weights(chosen, numbers)
    assert torch.equal(positions.long(), torch.cat(expected).sort().values)
    assert torch.equal(torch.cat(expected)[reordered], positions.long())
    assert torch.equal(layout.block_sums(torch.cat(expected)), torch.stack([part.sum() for part in expected]))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_grid_of_blocks(block: tuple[int, int]) -> None:
    size = block[0] * block[1]
    layout = SparseLayout(6, 24, size, size, block_rows=block[0], block_cols=block[1], padding_slots=2 * size)
    grid = layout.grid
    assert (grid.num_rows * block[0], grid.num_cols * block[1], grid.block_elements) == (6, 24, 1)
    assert (grid.num_active, grid.num_slots, grid.num_elements) == (1, 2, layout.num_positions)
    assert (layout.num_slots, layout.num_stored, layout.num_index_slots) == (2 * size, 4 * size, 4)


def test_boundaries_cut_blocks_by_rows_of_the_matrix() -> None:
    layout = SparseLayout(6, 4, 12, block_rows=2, block_cols=2)
    assert layout.row_boundaries(torch.tensor([1, 2, 5], dtype=torch.int32), 2) == [0, 1, 2, 3]
    assert layout.row_boundaries(torch.tensor([1, 2, 5], dtype=torch.int32), 4) == [0, 2, 3]


def test_blocks_of_a_huge_matrix_have_64_bit_weights() -> None:
    layout = SparseLayout(2**16, 2**16, 256, block_rows=16, block_cols=16)
    assert layout.index_dtype == torch.int32
    last = torch.tensor([layout.num_positions - 1], dtype=torch.int32)
    assert int(layout.weights_of(last)[-1]) == 2**32 - 1
