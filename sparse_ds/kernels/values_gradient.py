"""Gradient of the values of one sparse layer: the dense weight gradient at the indices.

    g_k = sum_t dY[t, row(k)] * X[t, col(k)]            (SFT paper, arXiv 2401.16405, appendix B)

Two paths compute it, and `crossover` says which one is taken:

    path        what is computed                         cost                  memory
    sampled     the K inner products                     transposes, then K    the transposes
    dense       dY^T X in blocks of rows, then a gather  one product           a scratch buffer

No path synchronizes with a device, but the dense one at the first call after the indices changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ds.kernels.crossover import AUTO, PathChoice
from sparse_ds.kernels.dense_row_blocks import RowBoundaries, dense_values_gradient
from sparse_ds.kernels.product_operands import ProductOperands
from sparse_ds.kernels.sampled_product import sampled_values_gradient


def values_gradient(
    operands: ProductOperands,
    indices_K: Tensor,
    row_boundaries: RowBoundaries,
    *,
    choice: PathChoice = AUTO,
    scratch_elements: int | None = None,
) -> Tensor:
    """The gradient of K values. Deterministic.

    Args:
        operands: of dW.
        indices_K: [K] flat row-major, ascending, int32 or int64.
        row_boundaries: of these indices; asked only if blocks of rows are computed.
        choice: of the path.
        scratch_elements: bound on the elements of a block of rows.

    Returns:
        [K] fp32. The products accumulate in fp32; on CPU with 16-bit inputs each sum is rounded to 16 bits once (not
        where many are sampled: `sampled_product`).
    """
    if indices_K.numel() == 0:
        return torch.zeros(0, dtype=torch.float32, device=indices_K.device)
    if choice.is_sampled(operands, indices_K.numel()):
        return sampled_values_gradient(operands, indices_K)
    return dense_values_gradient(operands, indices_K, row_boundaries, scratch_elements)


def reference_values_gradient(grad_output_TO: Tensor, input_TI: Tensor, indices_K: Tensor) -> Tensor:
    """Plain reference: the whole dense gradient in fp64, then a gather."""
    dense_OI = grad_output_TO.double().t() @ input_TI.double()
    return dense_OI.reshape(-1)[indices_K.long()]
