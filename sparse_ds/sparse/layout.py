"""How flat indices map to rows and columns of one matrix: the only place that knows.

Indices are flat and row-major: `index = row * num_cols + col`, unique and globally ascending at all times.
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

    Attributes:
        num_rows, num_cols: O, I.
        num_active: K at the start of the run; it stays so, unless events may move weights between matrices.
        spare_slots: how many more weights the matrix may come to hold.
    """

    num_rows: int
    num_cols: int
    num_active: int
    spare_slots: int = 0

    @property
    def num_slots(self) -> int:
        """Elements of `indices` and `values`; those behind the active weights are 0 and have no effect."""
        return self.num_active + self.spare_slots

    @property
    def num_elements(self) -> int:
        """N: all weights of the matrix."""
        return self.num_rows * self.num_cols

    @property
    def index_dtype(self) -> torch.dtype:
        """int32, or int64 for a matrix of 2^31 weights or more."""
        return torch.int32 if self.num_elements < 2**31 else torch.int64

    def rows_of(self, indices_K: Tensor) -> Tensor:
        """[K] row of each index, same dtype."""
        return indices_K // self.num_cols

    def cols_of(self, indices_K: Tensor) -> Tensor:
        """[K] column of each index, same dtype."""
        return indices_K % self.num_cols

    def row_boundaries(self, indices_K: Tensor, rows_per_block: int) -> list[int]:
        """Positions in the ascending `indices_K` at which blocks of `rows_per_block` rows begin, and K at the end.

        One device synchronization.
        """
        num_blocks = math.ceil(self.num_rows / rows_per_block)
        first_index = torch.arange(num_blocks + 1, device=indices_K.device) * (rows_per_block * self.num_cols)
        return [int(x) for x in torch.searchsorted(indices_K.long(), first_index).tolist()]


def num_active_weights(density: float, num_elements: int) -> int:
    """K = floor(density * N), exact for the decimal that the user wrote (0.29 * 100 is 29, not 28)."""
    return math.floor(Fraction(str(density)) * num_elements)
