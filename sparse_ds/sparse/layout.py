"""How indices map to rows and columns of one matrix: the only place that knows.

The active unit is a block of `block_rows` x `block_cols` neighbouring weights; 1 x 1, a single weight, by default. The
matrix [O, I] is a grid [O / block_rows, I / block_cols] of blocks:

    indices     [U] flat row-major positions on the grid, unique and globally ascending at all times
    values      [U * e] the e = block_rows * block_cols weights of the first block, row-major, then those of the next

With blocks of one weight the grid is the matrix, and an index is the flat position `row * num_cols + col` of a weight.
What leaves a run (adapters, exports, hashes) has flat positions of weights, whatever the blocks (`sorted_weights`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseLayout:
    """Shape of one target matrix, the number of its active weights, and room for them.

    Numbers of weights are multiples of the block.

    Attributes:
        num_rows, num_cols: O, I; multiples of the sides of the block.
        num_active: K at the start of the run; it stays so, unless events may move weights between matrices.
        spare_slots: how many more weights the matrix may come to hold.
        block_rows, block_cols: sides of a block.
        padding_slots: what is stored behind the slots, so that every rank owns whole blocks.
    """

    num_rows: int
    num_cols: int
    num_active: int
    spare_slots: int = 0
    block_rows: int = 1
    block_cols: int = 1
    padding_slots: int = 0

    def __post_init__(self) -> None:
        assert self.num_rows % self.block_rows == 0 and self.num_cols % self.block_cols == 0, f"{self}"
        numbers = (self.num_active, self.spare_slots, self.padding_slots)
        assert all(number % self.block_elements == 0 for number in numbers), f"{self}"

    @property
    def block_elements(self) -> int:
        """e: weights of a block."""
        return self.block_rows * self.block_cols

    @property
    def num_slots(self) -> int:
        """Weights there is room for; those behind the active weights are 0 and have no effect."""
        return self.num_active + self.spare_slots

    @property
    def num_stored(self) -> int:
        """Elements of `values`: the slots and the padding."""
        return self.num_slots + self.padding_slots

    @property
    def num_index_slots(self) -> int:
        """Elements of `indices`: blocks."""
        return self.num_stored // self.block_elements

    @property
    def num_elements(self) -> int:
        """N: all weights of the matrix."""
        return self.num_rows * self.num_cols

    @property
    def num_positions(self) -> int:
        """Blocks of the matrix: an index is below it."""
        return self.num_elements // self.block_elements

    @property
    def index_dtype(self) -> torch.dtype:
        """int32, or int64 for a grid of 2^31 blocks or more."""
        return torch.int32 if self.num_positions < 2**31 else torch.int64

    @property
    def grid(self) -> SparseLayout:
        """The grid as a matrix whose weights are the blocks: where blocks are chosen, they are weights of it."""
        if self.block_elements == 1:
            return self
        return SparseLayout(
            self.num_rows // self.block_rows,
            self.num_cols // self.block_cols,
            self.num_active // self.block_elements,
            self.spare_slots // self.block_elements,
        )

    def rows_of(self, flat_K: Tensor) -> Tensor:
        """[K] row of each flat position of a weight, same dtype."""
        return flat_K // self.num_cols

    def cols_of(self, flat_K: Tensor) -> Tensor:
        """[K] column of each flat position of a weight, same dtype."""
        return flat_K % self.num_cols

    def row_boundaries(self, indices_U: Tensor, rows_per_block: int) -> list[int]:
        """Positions in the ascending `indices_U` at which parts of `rows_per_block` rows of the matrix begin, and U at
        the end.

        `rows_per_block` must be a multiple of `block_rows`. One device synchronization.
        """
        assert rows_per_block % self.block_rows == 0, f"{rows_per_block} rows cut a block of {self.block_rows}"
        num_parts = math.ceil(self.num_rows / rows_per_block)
        step = rows_per_block // self.block_rows * (self.num_cols // self.block_cols)
        first_index = torch.arange(num_parts + 1, device=indices_U.device) * step
        return [int(x) for x in torch.searchsorted(indices_U.long(), first_index).tolist()]

    def strips_of(self, indices_U: Tensor) -> Tensor:
        """Where the rows of the blocks lie if the matrix is read as [N / block_cols, block_cols].

        Returns:
            [U * block_rows] rows of that view, block after block; int64 where int32 does not hold them. The values are
            `values.view(-1, block_cols)` then. With blocks of one weight these are the indices.
        """
        if self.block_rows == 1:
            return indices_U
        if self.num_elements // self.block_cols >= 2**31:
            indices_U = indices_U.long()
        grid_cols = self.num_cols // self.block_cols
        # The first strip of block (r, c) is r * block_rows * grid_cols + c = index + r * (block_rows - 1) * grid_cols.
        first_U = indices_U + indices_U // grid_cols * ((self.block_rows - 1) * grid_cols)
        offsets = torch.arange(self.block_rows, dtype=first_U.dtype, device=first_U.device) * grid_cols
        return (first_U[:, None] + offsets).view(-1)

    def weights_of(self, indices_U: Tensor) -> Tensor:
        """[U * e] flat positions of the weights, in the order of `values`; int64 where int32 does not hold them."""
        if self.block_elements == 1:
            return indices_U
        strips = self.strips_of(indices_U)
        if self.num_elements >= 2**31:
            strips = strips.long()
        offsets = torch.arange(self.block_cols, dtype=strips.dtype, device=strips.device)
        return (strips[:, None] * self.block_cols + offsets).view(-1)

    def sorted_weights(self, indices_U: Tensor, *values_K: Tensor) -> tuple[Tensor, ...]:
        """The weights' flat positions, ascending, and numbers per weight in their order instead of that of the blocks.

        Memory: about 24 bytes a weight, transient; nothing with blocks of one weight.

        Args:
            indices_U: [U] blocks.
            values_K: [U * e] each, in the order of `values`.

        Returns:
            ([U * e] positions, each of `values_K` reordered).
        """
        if self.block_elements == 1:
            return (indices_U, *values_K)
        flat_K, order = self.weights_of(indices_U).sort()
        return (flat_K, *(values[order] for values in values_K))

    def block_after_block(self, rows_BI: Tensor) -> Tensor:
        """Some whole rows of blocks of a dense matrix [B, I], flat in the order of values; a view where it can be."""
        if self.block_cols == 1 and self.block_rows == 1:
            return rows_BI.view(-1)
        blocks = rows_BI.view(-1, self.block_rows, self.num_cols // self.block_cols, self.block_cols)
        return blocks.transpose(1, 2).reshape(-1)

    def sums_of_lines(self, row_scores_O: Tensor, col_scores_I: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of rows and columns of the grid: the sum over a block of `row_score * col_score` is their product.

        Added in fp64 and rounded once to the dtype of the scores.
        """
        if self.block_elements == 1:
            return row_scores_O, col_scores_I
        rows = row_scores_O.view(-1, self.block_rows).double().sum(1).to(row_scores_O.dtype)
        return rows, col_scores_I.view(-1, self.block_cols).double().sum(1).to(col_scores_I.dtype)

    def block_sums(self, numbers_K: Tensor) -> Tensor:
        """[U] sum over each block of [U * e] numbers per weight; the numbers themselves with blocks of one weight."""
        return numbers_K if self.block_elements == 1 else numbers_K.view(-1, self.block_elements).sum(1)


def num_active_weights(density: float, num_elements: int) -> int:
    """K = floor(density * N), exact for the decimal that the user wrote (0.29 * 100 is 29, not 28)."""
    return math.floor(Fraction(str(density)) * num_elements)
