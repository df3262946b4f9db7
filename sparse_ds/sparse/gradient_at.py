"""The gradient of the weights at some indices of a matrix, whatever a block is."""

from __future__ import annotations

from torch import Tensor

from sparse_ds.kernels.block_values_gradient import block_values_gradient
from sparse_ds.kernels.crossover import AUTO, PathChoice
from sparse_ds.kernels.dense_row_blocks import RowBoundaries
from sparse_ds.kernels.product_operands import ProductOperands
from sparse_ds.kernels.values_gradient import values_gradient
from sparse_ds.sparse.layout import SparseLayout


def gradient_at(
    layout: SparseLayout,
    operands: ProductOperands,
    indices_U: Tensor,
    row_boundaries: RowBoundaries,
    *,
    choice: PathChoice = AUTO,
    scratch_elements: int | None = None,
) -> Tensor:
    """[U * e] fp32, in the order of values.

    Args:
        layout: of the matrix.
        operands: of its dense gradient.
        indices_U: [U] ascending.
        row_boundaries: `layout.row_boundaries` of these indices.
        choice: of the path; of its crossovers blocks have their own.
        scratch_elements: bound on the elements of a part of the dense gradient.
    """
    on_tensor_cores = operands.input_TI.is_cuda and layout.block_cols > 1
    if layout.block_rows > 1 or on_tensor_cores:
        return block_values_gradient(
            operands,
            indices_U,
            layout.block_rows,
            layout.block_cols,
            row_boundaries,
            path=choice.path,
            scratch_elements=scratch_elements,
        )
    # The weights of blocks of one row ascend like the blocks, and on the CPU a strip of one row is no faster.
    return values_gradient(
        operands,
        layout.weights_of(indices_U),
        lambda num_rows: [boundary * layout.block_cols for boundary in row_boundaries(num_rows)],
        choice=choice,
        scratch_elements=scratch_elements,
    )
