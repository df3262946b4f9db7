"""SFT-MA: drop the smallest |values|, grow by the product of SM3's row and column accumulators."""

from __future__ import annotations

from torch import Tensor

from sparse_ds.selection.apply_event import EventResult, apply_event
from sparse_ds.selection.drop import smallest_magnitude
from sparse_ds.selection.outer_topk import outer_product_topk


def select_sft_ma(indices_K: Tensor, values_K: Tensor, row_acc: Tensor, col_acc: Tensor, k: int) -> EventResult:
    """One SFT-MA event on one tensor of shape [len(row_acc), len(col_acc)].

    Weights grow among those inactive before the drop, so that none is both dropped and grown. If fewer than k are
    inactive, as many are grown as there are, and as many are dropped: the smallest.

    Memory: O(rows + cols + K). Time: O(K log K + rows + cols).

    Args:
        indices_K: [K] int32 or int64, unique, ascending.
        values_K: [K] floating point.
        row_acc, col_acc: fp32 accumulators, >= 0.
        k: weights to replace, 0 <= k <= K.

    Raises:
        RuntimeError: a value or an accumulator is not finite.

    Reference: Scaling Sparse Fine-Tuning to Large Language Models (Ansell et al. 2024, arXiv 2401.16405), section 3.3.
    """
    grown_indices = outer_product_topk(row_acc, col_acc, indices_K, k)
    drop_positions = smallest_magnitude(values_K, indices_K, grown_indices.numel())
    return apply_event(indices_K, drop_positions, grown_indices)
