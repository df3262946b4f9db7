"""The dense weight gradient, one block of rows at a time: the universal path to the gradient of the values.

    for each block of rows with active weights:   scratch = dY[:, block]^T X,   gather

Memory: the block, in a scratch buffer of at most SCRATCH_ELEMENTS elements (one row at least) that all blocks of a
matrix share: 16 MiB in 16 bits on the CPU, 32 MiB in fp32. (On the CPU one that is kept made no step faster.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sparse_ds.kernels.product_operands import ProductOperands

SCRATCH_ELEMENTS = 2**23
"""Elements of the dense block that exists at one time (8.4 million): large enough that the product runs at full speed,
small beside one layer of a 7B model (45 million weights); on a GPU, in fp32, it stays in the L2 cache (32 MiB)."""

RowBoundaries = Callable[[int], Sequence[int]]
"""`boundaries(rows_per_block)`: positions in the ascending indices at which blocks of so many rows begin, and K."""


def rows_per_block(num_rows: int, num_cols: int, scratch_elements: int | None = None) -> int:
    """Rows of dW computed at one time; by default as many as SCRATCH_ELEMENTS allows."""
    return min(num_rows, max(1, (scratch_elements or SCRATCH_ELEMENTS) // num_cols))


def gradient_block(operands: ProductOperands, first_row: int, num_rows: int, out: Tensor | None = None) -> Tensor:
    """Up to `num_rows` rows of the dense weight gradient, from `first_row` on.

    Args:
        operands: of dW.
        first_row, num_rows: of the block; the last one of a matrix may be shorter.
        out: [num_rows, I] in the dtype of the result, to be written; without it new memory is taken.

    Returns:
        [B, I]; on CUDA fp32, on CPU the dtype of the input.
    """
    input_TI = operands.input_TI
    # On the CPU a 16-bit product whose first operand lies transposed takes up to twice the time.
    grad_output_BT = operands.grad_output_rows(first_row, num_rows)
    if out is not None:
        out = out[: grad_output_BT.shape[0]]
    if result_dtype(input_TI) == input_TI.dtype:
        return torch.mm(grad_output_BT, input_TI, out=out)
    return torch.mm(grad_output_BT, input_TI, out_dtype=torch.float32, out=out)


def result_dtype(input_TI: Tensor) -> torch.dtype:
    """Of `gradient_block`: torch's products on the CPU return what they get."""
    return torch.float32 if input_TI.is_cuda else input_TI.dtype


def dense_values_gradient(
    operands: ProductOperands,
    indices_K: Tensor,
    row_boundaries: RowBoundaries,
    scratch_elements: int | None = None,
) -> Tensor:
    """The gradient of K values; see `values_gradient` for arguments and result."""
    num_cols, num_rows = operands.num_cols, rows_per_block(operands.num_rows, operands.num_cols, scratch_elements)
    gradient_K = torch.empty(indices_K.numel(), dtype=torch.float32, device=indices_K.device)
    scratch_BI = operands.input_TI.new_empty(num_rows, num_cols, dtype=result_dtype(operands.input_TI))
    for block, (begin, end) in enumerate(pairwise(row_boundaries(num_rows))):
        if begin == end:
            continue
        dense_BI = gradient_block(operands, block * num_rows, num_rows, out=scratch_BI)
        positions = indices_K[begin:end]
        if block > 0:
            positions = positions - block * num_rows * num_cols
        gradient_K[begin:end] = dense_BI.view(-1).index_select(0, positions)
    return gradient_K
