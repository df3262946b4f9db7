"""Gradient of the values of one sparse layer: the dense weight gradient, sampled at the indices, block by block.

    g_k = sum_t dY[t, row(k)] * X[t, col(k)]            (SFT paper, arXiv 2401.16405, appendix B)

The dense gradient dW = dY^T X exists for one block of rows at a time, in a scratch buffer of bounded size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sparse_ds.kernels.product_operands import ProductOperands

SCRATCH_ELEMENTS = 2**23
"""Elements of the dense block that exists at one time (8.4 million: 16 MiB in bf16, 32 MiB in fp32): large enough
that the product runs at full speed, small beside one layer of a 7B model (45 million weights)."""

RowBoundaries = Callable[[int], Sequence[int]]
"""`boundaries(rows_per_block)`: positions in the ascending indices at which blocks of so many rows begin, and K."""


def rows_per_block(num_rows: int, num_cols: int, scratch_elements: int | None = None) -> int:
    """Rows of dW computed at one time; by default as many as SCRATCH_ELEMENTS allows."""
    return min(num_rows, max(1, (scratch_elements or SCRATCH_ELEMENTS) // num_cols))


def values_gradient(
    operands: ProductOperands,
    indices_K: Tensor,
    row_boundaries: RowBoundaries,
    *,
    scratch_elements: int | None = None,
) -> Tensor:
    """The gradient of K values.

    Args:
        operands: of dW.
        indices_K: [K] flat row-major, ascending, int32 or int64.
        row_boundaries: of these indices; asked only if blocks of rows are computed.
        scratch_elements: bound on the elements of a block.

    Returns:
        [K] fp32. The products accumulate in fp32; on CPU with 16-bit inputs each sum is rounded to 16 bits once.
    """
    num_rows_in_block = rows_per_block(operands.num_rows, operands.num_cols, scratch_elements)
    gradient_K = torch.empty(indices_K.numel(), dtype=torch.float32, device=indices_K.device)
    for block, (begin, end) in enumerate(pairwise(row_boundaries(num_rows_in_block))):
        if begin == end:
            continue
        first_row = block * num_rows_in_block
        dense_BI = gradient_block(operands, first_row, num_rows_in_block)
        positions = indices_K[begin:end].long() - first_row * operands.num_cols
        gradient_K[begin:end] = dense_BI.view(-1).index_select(0, positions)
        del dense_BI  # or two of them would be there while the next one is made
    return gradient_K


def gradient_block(operands: ProductOperands, first_row: int, num_rows: int) -> Tensor:
    """Up to `num_rows` rows of the dense weight gradient, from `first_row` on.

    Returns:
        [B, I]; on CUDA fp32, on CPU the dtype of the input.
    """
    # Copying the small operand first makes the bf16 product on CPU about twice as fast.
    grad_output_BT = operands.grad_output_TO[:, first_row : first_row + num_rows].t().contiguous()
    input_TI = operands.input_TI
    if input_TI.is_cuda and input_TI.dtype != torch.float32:
        return torch.mm(grad_output_BT, input_TI, out_dtype=torch.float32)
    return torch.mm(grad_output_BT, input_TI)


def reference_values_gradient(grad_output_TO: Tensor, input_TI: Tensor, indices_K: Tensor) -> Tensor:
    """Plain reference: the whole dense gradient in fp64, then a gather."""
    dense_OI = grad_output_TO.double().t() @ input_TI.double()
    return dense_OI.reshape(-1)[indices_K.long()]
