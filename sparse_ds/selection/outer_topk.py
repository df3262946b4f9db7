"""The k inactive positions of a matrix with the largest row score x column score, without ever forming the matrix.

Three steps, all vectorised, on numbers of rows, columns, k and K (active positions) only:

1. Threshold. The k-th largest inactive score is found by bisection over the bit patterns of fp64 (ordered like the
   numbers they encode, for numbers >= 0). How many positions score at least theta is a sum over rows of the number of
   columns with `row * col >= theta`, a binary search in the sorted columns; from it goes the number of active positions
   that score at least theta, a binary search in their sorted scores.
2. Positions above the threshold: in each row a prefix of the columns sorted by score.
3. Positions at the threshold, of which the first by index are needed: in each row one run of columns of equal score,
   ascending by column, so rows are walked until there are enough. At threshold 0 the run is the whole row (where the
   row scores 0) or the columns of score 0. Ties may be as many as the matrix has entries (untouched rows and columns
   score 0): only those up to the row of the last one needed are enumerated.

Scores are fp32 and their product is exact in fp64 (24 + 24 bits of 53, exponents within range; fp32 products would
underflow), so the order is that of the real numbers, and every rank finds the same set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def outer_product_topk(row_scores_O: Tensor, col_scores_I: Tensor, active_K: Tensor, k: int) -> Tensor:
    """Find the k inactive positions with the largest `row_scores_O[r] * col_scores_I[c]`, ties by ascending index.

    Time: O((rows + cols) log + (k + K) log). Memory: O(rows + cols + k + K). A matrix of 4096 x 11008 with k = K = 1.1
    million takes about half a second on one CPU core.

    Args:
        row_scores_O: [rows] fp32, finite, >= 0.
        col_scores_I: [cols] fp32, finite, >= 0.
        active_K: [K] int32 or int64 flat row-major indices, unique, ascending.
        k: how many to find, >= 0.

    Returns:
        [min(k, rows * cols - K)] int64 flat indices, ascending.

    Raises:
        RuntimeError: a score is not finite.
    """
    for scores in (row_scores_O, col_scores_I):
        assert scores.dtype == torch.float32 and scores.dim() == 1, f"scores: {scores.dtype} {tuple(scores.shape)}"
        if not bool(scores.isfinite().all()):
            raise RuntimeError("row or column scores are not finite: the training has diverged")
        assert bool((scores >= 0).all()), "row or column scores are negative"
    active = active_K.long()
    k = min(k, row_scores_O.numel() * col_scores_I.numel() - active.numel())
    if k <= 0:
        return torch.empty(0, dtype=torch.int64, device=row_scores_O.device)
    matrix = _ScoreMatrix.build(row_scores_O, col_scores_I)
    active_scores = matrix.scores_at(active)
    bits = _threshold_bits(matrix, active_scores, k)
    threshold = _from_bits(bits)
    if bits:
        num_above_O = matrix.count_at_least(_from_bits(bits + 1))
        num_tied_O = matrix.count_at_least(threshold) - num_above_O
    else:
        num_above_O = matrix.count_positive()
        num_tied_O = matrix.num_cols - num_above_O
    above = matrix.enumerate_prefixes(num_above_O).sort().values
    above = _remove(above, active[active_scores > threshold])
    tied_active = active[active_scores == threshold]
    ties = _first_ties(matrix, num_above_O, num_tied_O, tied_active, k - above.numel())
    return torch.cat([above, ties]).sort().values


@dataclass(frozen=True, slots=True)
class _ScoreMatrix:
    """The score of every position of a matrix, implicitly: sorted columns, and distinct values of rows and columns.

    Attributes:
        rows, cols: [rows], [cols] fp64 scores.
        col_order: [cols] int64, columns by descending score, ties by ascending column.
        distinct_cols: [D] fp64 distinct positive column scores, ascending.
        num_cols_from: [D + 1] int64, number of columns with a score >= distinct_cols[i]; 0 at the end.
        distinct_rows, num_rows_of, row_rank: distinct row scores, how many rows have each, and which one a row has.
    """

    rows: Tensor
    cols: Tensor
    col_order: Tensor
    distinct_cols: Tensor
    num_cols_from: Tensor
    distinct_rows: Tensor
    num_rows_of: Tensor
    row_rank: Tensor

    @classmethod
    def build(cls, row_scores_O: Tensor, col_scores_I: Tensor) -> _ScoreMatrix:
        rows_O, cols_I = row_scores_O.double(), col_scores_I.double()
        distinct_cols, num_cols_of = torch.unique(cols_I[cols_I > 0], return_counts=True)
        num_cols_from = torch.zeros(distinct_cols.numel() + 1, dtype=torch.int64, device=cols_I.device)
        num_cols_from[:-1] = num_cols_of.flip(0).cumsum(0).flip(0)
        distinct_rows, row_rank_O, num_rows_of = torch.unique(rows_O, return_inverse=True, return_counts=True)
        col_order_I = torch.sort(cols_I, descending=True, stable=True).indices
        return cls(rows_O, cols_I, col_order_I, distinct_cols, num_cols_from, distinct_rows, num_rows_of, row_rank_O)

    @property
    def num_cols(self) -> int:
        return self.cols.numel()

    def scores_at(self, flat: Tensor) -> Tensor:
        """fp64 scores of flat positions."""
        rows = torch.div(flat, self.num_cols, rounding_mode="trunc")
        return self.rows[rows] * self.cols[flat - rows * self.num_cols]

    def _count_by_distinct_row(self, theta: Tensor) -> Tensor:
        """For each distinct row score: number of columns with row * col >= theta > 0.

        Comparing col with the rounded quotient q of theta / row is exact. Rounding is monotone, so theta <= row * col
        gives q <= col. If theta > row * col, which is an fp64 number, then theta exceeds it relatively by more than
        2^-53, more than half a unit in the last place of any col, so that q > col. Row 0 has q = inf: no column.
        """
        first = torch.searchsorted(self.distinct_cols, theta / self.distinct_rows)
        return self.num_cols_from[first]

    def count_at_least(self, theta: Tensor) -> Tensor:
        """[rows] number of columns with a score >= theta > 0: that many first ones of `col_order`."""
        return self._count_by_distinct_row(theta)[self.row_rank]

    def total_at_least(self, theta: Tensor) -> int:
        """Number of positions with a score >= theta > 0."""
        return int((self._count_by_distinct_row(theta) * self.num_rows_of).sum())

    def count_positive(self) -> Tensor:
        """[rows] number of columns with a score > 0: that many first ones of `col_order`, in rows of score > 0."""
        return torch.where(self.rows > 0, self.num_cols_from[0], 0)

    def enumerate_prefixes(self, num_O: Tensor) -> Tensor:
        """Flat positions of the first num_O[r] columns by score in each row, rows ascending."""
        rows, ranks = _ranks_within_rows(num_O)
        return rows * self.num_cols + self.col_order[ranks]

    def enumerate_runs(self, start_O: Tensor, num_O: Tensor) -> Tensor:
        """Flat positions of the num_O[r] columns of equal score that follow the first start_O[r] ones, ascending."""
        rows, ranks = _ranks_within_rows(num_O)
        columns = self.col_order[start_O[rows] + ranks]
        # All scores of a row of score 0 are equal, whatever the order of the column scores.
        return rows * self.num_cols + torch.where(self.rows[rows] > 0, columns, ranks)


def _ranks_within_rows(num_O: Tensor) -> tuple[Tensor, Tensor]:
    """num_O [2, 0, 3] gives rows [0, 0, 2, 2, 2] and ranks [0, 1, 0, 1, 2]."""
    rows = torch.repeat_interleave(num_O)
    begins_O = num_O.cumsum(0) - num_O
    return rows, torch.arange(rows.numel(), device=num_O.device) - begins_O[rows]


def _from_bits(bits: int) -> Tensor:
    """The fp64 number >= 0 with this bit pattern, 0-dim on the CPU."""
    return torch.tensor(bits, dtype=torch.int64).view(torch.float64)


def _to_bits(number: Tensor) -> int:
    """The bit pattern of an fp64 number >= 0; the larger the number, the larger the pattern."""
    return int(number.view(torch.int64))


def _threshold_bits(matrix: _ScoreMatrix, active_scores: Tensor, k: int) -> int:
    """Bit pattern of the k-th largest score of the inactive positions (at least k are inactive)."""
    ascending = active_scores.sort().values

    def enough_at_least(bits: int) -> bool:
        theta = _from_bits(bits)
        num_active_below = int(torch.searchsorted(ascending, theta.to(ascending.device)))
        return matrix.total_at_least(theta) - (ascending.numel() - num_active_below) >= k

    if matrix.distinct_cols.numel() == 0 or not bool((matrix.rows > 0).any()):
        return 0
    low = _to_bits(matrix.rows[matrix.rows > 0].min() * matrix.distinct_cols[0])
    high = _to_bits(matrix.distinct_rows[-1] * matrix.distinct_cols[-1]) + 1
    if not enough_at_least(low):
        return 0
    # Invariant: enough positions score at least `low`, not enough score at least `high`.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if enough_at_least(middle) else (low, middle)
    return low


def _remove(ascending: Tensor, members: Tensor) -> Tensor:
    """An ascending array without some of its members."""
    kept = torch.ones(ascending.numel(), dtype=torch.bool, device=ascending.device)
    kept[torch.searchsorted(ascending, members)] = False
    return ascending[kept]


def _first_ties(
    matrix: _ScoreMatrix, num_above_O: Tensor, num_tied_O: Tensor, tied_active: Tensor, num_needed: int
) -> Tensor:
    """The first `num_needed` inactive positions at the threshold, ascending.

    Enumerates no row after the one in which the last of them lies, so at most num_needed + K + cols positions.
    """
    rows_of_active = torch.div(tied_active, matrix.num_cols, rounding_mode="trunc")
    num_inactive_O = num_tied_O - torch.bincount(rows_of_active, minlength=num_tied_O.numel())
    reached_O = num_inactive_O.cumsum(0) - num_inactive_O < num_needed
    ties = matrix.enumerate_runs(num_above_O, torch.where(reached_O, num_tied_O, 0))
    return _remove(ties, tied_active[reached_O[rows_of_active]])[:num_needed]
