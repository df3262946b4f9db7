"""Gradient of the values of active blocks: only the blocks' rows of dY and columns of X are multiplied.

    G_u = dY[:, rows(u)]^T X[:, cols(u)]        [block_rows, block_cols] for each active block u

    blocks      CPU     gathered strips of dY^T and X^T, one batched product for some blocks at a time
                CUDA    a kernel on the tensor cores (`triton_kernels`), where it supports the block; else dense
    dense       everywhere: the dense gradient in parts of whole rows of blocks, of which the blocks are taken

The first costs the share of the active blocks, the second always all of them; at `crossover.BLOCK_DEFAULTS` of all
blocks they are about equally fast. On a CPU without AMX (bf16, 2048 x 2048, 1024 tokens, one core) 16 x 16 blocks took
5 ms at 2.3 % and 17 ms at 10 %, where the dense product took 51 ms and single weights by `values_gradient` 19 ms at
2.3 %. With AMX the dense product is so fast that gathering the strips for it takes longer from 1 % on.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sparse_ds.kernels import triton_kernels
from sparse_ds.kernels.crossover import BLOCK_DEFAULTS, device_kind
from sparse_ds.kernels.dense_row_blocks import RowBoundaries, gradient_block, rows_per_block
from sparse_ds.kernels.product_operands import ProductOperands

GATHERED_ELEMENTS = 2**19
"""Elements of the strips that are gathered at one time on the CPU: 1 MiB in bf16, within a core's second-level cache
(at 2^17 the calls cost twice as much as the product, at 2^21 memory does)."""


def block_values_gradient(
    operands: ProductOperands,
    indices_U: Tensor,
    block_rows: int,
    block_cols: int,
    row_boundaries: RowBoundaries,
    *,
    path: Literal["auto", "sampled", "dense"] = "auto",
    scratch_elements: int | None = None,
) -> Tensor:
    """The gradient of all weights of U blocks.

    Args:
        operands: of dW.
        indices_U: [U] row-major positions on the grid [O / block_rows, I / block_cols], ascending.
        block_rows, block_cols: sides of a block; they divide O and I.
        row_boundaries: of these indices, for a multiple of `block_rows` rows; asked only if the dense product is
            computed.
        path: "sampled" computes only the blocks, at any density; "auto" goes by `crossover.BLOCK_DEFAULTS`.
        scratch_elements: bound on the elements of its parts.

    Returns:
        [U * block_rows * block_cols] fp32, block after block, row-major inside. The products accumulate in fp32; on
        CPU with 16-bit inputs each sum is rounded to 16 bits once.
    """
    num_blocks = operands.num_rows // block_rows * (operands.num_cols // block_cols)
    crossover = BLOCK_DEFAULTS[device_kind(operands.input_TI.device.type), operands.input_TI.element_size()]
    is_dense = indices_U.numel() > crossover * num_blocks if path == "auto" else path == "dense"
    if is_dense:
        return dense_blocks(operands, indices_U, block_rows, block_cols, row_boundaries, scratch_elements)
    if triton_kernels.available(operands.input_TI) and triton_kernels.supports_block(block_rows, block_cols):
        grad_output_TO, input_TI = operands.grad_output_TO.contiguous(), operands.input_TI.contiguous()
        return triton_kernels.block_values_gradient(grad_output_TO, input_TI, indices_U, block_rows, block_cols)
    if not operands.input_TI.is_cuda:
        return gathered_blocks(operands, indices_U, block_rows, block_cols)
    return dense_blocks(operands, indices_U, block_rows, block_cols, row_boundaries, scratch_elements)


def gathered_blocks(operands: ProductOperands, indices_U: Tensor, block_rows: int, block_cols: int) -> Tensor:
    """Batched products of gathered strips. Args, returns: as `block_values_gradient`.

    Memory: both transposes, and GATHERED_ELEMENTS gathered elements (or one block's strips).
    """
    num_tokens, grid_cols = operands.num_tokens, operands.num_cols // block_cols
    strips_RBT = operands.grad_output_OT.view(-1, block_rows, num_tokens)
    strips_CBT = operands.input_IT.view(-1, block_cols, num_tokens)
    rows_U, cols_U = indices_U // grid_cols, indices_U % grid_cols
    gradient = torch.empty(indices_U.numel(), block_rows, block_cols, device=indices_U.device)
    num_at_once = max(1, GATHERED_ELEMENTS // ((block_rows + block_cols) * num_tokens))
    for begin in range(0, indices_U.numel(), num_at_once):
        some = slice(begin, begin + num_at_once)
        left = strips_RBT.index_select(0, rows_U[some])
        right = strips_CBT.index_select(0, cols_U[some])
        gradient[some] = torch.bmm(left, right.transpose(1, 2))
    return gradient.view(-1)


def dense_blocks(
    operands: ProductOperands,
    indices_U: Tensor,
    block_rows: int,
    block_cols: int,
    row_boundaries: RowBoundaries,
    scratch_elements: int | None = None,
) -> Tensor:
    """The blocks taken from the dense product, part by part. Args, returns: as `block_values_gradient`."""
    rows_in_part = rows_per_block(operands.num_rows, operands.num_cols, scratch_elements)
    rows_in_part = max(rows_in_part // block_rows, 1) * block_rows
    grid_cols = operands.num_cols // block_cols
    gradient = torch.empty(indices_U.numel(), block_rows, block_cols, device=indices_U.device)
    for part, (begin, end) in enumerate(pairwise(row_boundaries(rows_in_part))):
        if begin == end:
            continue
        dense_BI = gradient_block(operands, part * rows_in_part, rows_in_part)
        by_block = dense_BI.view(-1, block_rows, grid_cols, block_cols).transpose(1, 2)
        first = part * rows_in_part // block_rows * grid_cols
        positions = indices_U[begin:end].long() - first
        gradient[begin:end] = by_block[positions // grid_cols, positions % grid_cols]
        del dense_BI, by_block  # or two of them would be there while the next one is made
    return gradient.view(-1)


def reference_block_values_gradient(
    grad_output_TO: Tensor, input_TI: Tensor, indices_U: Tensor, block_rows: int, block_cols: int
) -> Tensor:
    """Plain reference: the whole dense gradient in fp64, cut into blocks."""
    dense_OI = grad_output_TO.double().t() @ input_TI.double()
    blocks = [
        dense_OI[row : row + block_rows, col : col + block_cols].reshape(-1)
        for row in range(0, dense_OI.shape[0], block_rows)
        for col in range(0, dense_OI.shape[1], block_cols)
    ]
    return torch.stack(blocks)[indices_U.long()].view(-1)
