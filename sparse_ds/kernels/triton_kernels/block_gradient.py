"""The gradient of single weights or of small blocks of them, on tensor cores.

    g[u, i, j] = sum_t dY[t, row(u) * block_rows + i] * X[t, col(u) * block_cols + j]

A program takes GROUP consecutive blocks (single weights are blocks of 1 x 1). They are ascending, so they lie in few
rows of the weight: it multiplies the GROUP * block_cols gathered columns of X with a window of WINDOW columns of dY,
and then every block picks its own rows of the product:

                 TOKENS                WINDOW rows of W                      window
    columns    +--------+            +----------------+          columns   +--------+
    of X, one  |  X^T   |    x    T  |       dY       |    =     of X      | .  *   |   * what the block of this
    set for    +--------+            +----------------+                    | *      |     column picks; the rest
    each block                                                             +--------+     is thrown away

Blocks of a group that lie beyond the window get another one, so any indices are right; those of the methods, spread
over all rows, need one or two. A dense product would compute 1 / density as much. Traffic, which bounds it: T elements
of X per column, from the L2 cache.

Where the programs are too few to fill a GPU, tokens are split over several and their sums added afterwards, in order:
no atomic operation, the same bits in every run and on every GPU.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparse_ds.kernels.triton_kernels.rounding import INTERPRETED

FEW_PROGRAMS = 256
"""Below this tokens are split: about two programs for each multiprocessor of an A100 (108) or H200 (132)."""
ALIGNED_TOKENS = 16
"""What the rows of a transposed input are filled up to: triton looks for multiples of 16."""
NO_ROW = tl.constexpr(2**31 - 1)


@triton.jit
def gradient_kernel(
    grad_output,
    input,
    positions,
    gradient,
    num_tokens,
    num_input_tokens,
    tokens_per_split,
    num_rows,
    num_blocks,
    blocks_per_row,
    split_stride,
    grad_output_stride,
    input_token_stride,
    input_col_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIGN: tl.constexpr,
    TOKENS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # m counts the columns of X of this group: BLOCK_COLS for each block.
    m = tl.arange(0, GROUP * BLOCK_COLS)
    block = tl.program_id(0) * GROUP + m // BLOCK_COLS
    exists = block < num_blocks
    position = tl.load(positions + block, mask=exists, other=0)
    row = tl.where(exists, (position // blocks_per_row).to(tl.int32), NO_ROW)  # of the grid of blocks
    col = (position % blocks_per_row).to(tl.int64) * BLOCK_COLS + m % BLOCK_COLS

    t = tl.arange(0, TOKENS)
    w = tl.arange(0, WINDOW)
    begin = tl.program_id(1) * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, num_tokens)
    input_end = tl.minimum(begin + tokens_per_split, num_input_tokens)
    input_begin = input + begin.to(tl.int64) * input_token_stride
    input_pointers = input_begin + col[:, None] * input_col_stride + t[None, :] * input_token_stride
    grad_output_begin = grad_output + begin.to(tl.int64) * grad_output_stride

    next_row = tl.min(row, axis=0)
    while next_row < NO_ROW:
        window_begin = next_row // (ALIGN // BLOCK_ROWS) * (ALIGN // BLOCK_ROWS)  # aligned: wide loads
        here = (row >= window_begin) & (row < window_begin + WINDOW // BLOCK_ROWS)
        weight_row = window_begin * BLOCK_ROWS + w
        in_matrix = weight_row < num_rows
        x_pointers = input_pointers
        dy_pointers = grad_output_begin + t[:, None].to(tl.int64) * grad_output_stride + weight_row[None, :]
        product = tl.zeros((GROUP * BLOCK_COLS, WINDOW), dtype=tl.float32)
        for first in range(begin, end, TOKENS):
            x = tl.load(x_pointers, mask=here[:, None] & (t[None, :] < input_end - first), other=0.0)
            dy = tl.load(dy_pointers, mask=in_matrix[None, :] & (t[:, None] < end - first), other=0.0)
            if INTERPRETED:  # its product of bf16 matrices is wrong
                x = x.to(tl.float32)
                dy = dy.to(tl.float32)
            product = tl.dot(x, dy, product, input_precision="ieee")
            x_pointers += TOKENS * input_token_stride
            dy_pointers += TOKENS * grad_output_stride
        # Each column of X belongs to one block, whose rows are rows_in_window[m] of the product.
        row_in_window = row - window_begin
        out = gradient + tl.program_id(1).to(tl.int64) * split_stride
        if BLOCK_ROWS == 1:
            picked = tl.sum(tl.where(w[None, :] == row_in_window[:, None], product, 0.0), axis=1)
            tl.store(out + block.to(tl.int64) * BLOCK_COLS + m % BLOCK_COLS, picked, mask=here)
        else:
            ROWS: tl.constexpr = WINDOW // BLOCK_ROWS
            by_row = tl.reshape(product, (GROUP * BLOCK_COLS, ROWS, BLOCK_ROWS))
            r = tl.arange(0, ROWS)
            chosen = tl.sum(tl.where(r[None, :, None] == row_in_window[:, None, None], by_row, 0.0), axis=1)
            i = tl.arange(0, BLOCK_ROWS)
            place = block.to(tl.int64) * (BLOCK_ROWS * BLOCK_COLS) + m % BLOCK_COLS
            tl.store(out + place[:, None] + i[None, :] * BLOCK_COLS, chosen, mask=here[:, None])
        next_row = tl.min(tl.where(row >= window_begin + WINDOW // BLOCK_ROWS, row, NO_ROW), axis=0)


@dataclass(frozen=True)
class Tiling:
    """Compile-time sizes of one launch.

    Attributes:
        group: blocks of a program.
        window: rows of the weight of one product.
        align: rows that a window's first row is a multiple of.
        tokens: of one step of the product.
    """

    group: int
    window: int
    align: int
    tokens: int
    num_warps: int
    num_stages: int


def tiling(num_blocks: int, num_rows: int, block_rows: int, block_cols: int, dtype: torch.dtype) -> Tiling:
    """Sizes by the number of blocks and rows: only shapes decide, nothing is read from the device.

    Columns of X per program: 128 where that makes enough programs, else 64. Window: the rows that a group is expected
    to spread over (blocks are ascending), 16 to 64.
    """
    wide = dtype == torch.float32
    columns = 128 if not wide and num_blocks * block_cols >= 128 * FEW_PROGRAMS else 64
    group = columns // block_cols
    align = max(16, block_rows)
    expected_rows = group * num_rows / max(1, num_blocks) + align / 2
    # fp32 runs on the ordinary units; other sizes than these spill registers on sm_80 (triton 3.7 and 3.9).
    window = max(align, 32) if wide else align
    while window < 64 and window < expected_rows:
        window *= 2
    return Tiling(group, window, align, tokens=16 if wide else 64, num_warps=4, num_stages=4)


def _gradient(grad_output_TO: Tensor, input_TI: Tensor, positions_U: Tensor, block: tuple[int, int]) -> Tensor:
    """[U * block_rows * block_cols]; `input_TI` may have any strides, and zeros behind its T tokens."""
    (num_tokens, num_rows), num_cols = grad_output_TO.shape, input_TI.shape[1]
    assert input_TI.shape[0] >= num_tokens and input_TI.dtype == grad_output_TO.dtype
    assert grad_output_TO.stride(1) == 1 or num_rows == 1
    block_rows, block_cols = block
    num_blocks = positions_U.numel()
    num_values = num_blocks * block_rows * block_cols
    if not num_values or not num_tokens:
        return torch.zeros(num_values, dtype=torch.float32, device=input_TI.device)
    sizes = tiling(num_blocks, num_rows, block_rows, block_cols, input_TI.dtype)
    num_programs = triton.cdiv(num_blocks, sizes.group)
    num_steps = triton.cdiv(num_tokens, sizes.tokens)
    num_splits = max(1, min(FEW_PROGRAMS // num_programs, num_steps // 8))
    tokens_per_split = triton.cdiv(num_steps, num_splits) * sizes.tokens
    num_splits = triton.cdiv(num_tokens, tokens_per_split)
    gradient_SK = torch.empty((num_splits, num_values), dtype=torch.float32, device=input_TI.device)
    gradient_kernel[(num_programs, num_splits)](
        grad_output_TO,
        input_TI,
        positions_U,
        gradient_SK,
        num_tokens,
        input_TI.shape[0],
        tokens_per_split,
        num_rows,
        num_blocks,
        num_cols // block_cols,
        num_values,
        grad_output_TO.stride(0),
        *input_TI.stride(),
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        GROUP=sizes.group,
        WINDOW=sizes.window,
        ALIGN=sizes.align,
        TOKENS=sizes.tokens,
        INTERPRETED=INTERPRETED,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        enable_fp_fusion=True,
    )
    return gradient_SK[0] if num_splits == 1 else gradient_SK.sum(0)


def sampled_gradient(grad_output_TO: Tensor, input_IT: Tensor, indices_K: Tensor) -> Tensor:
    """See `kernels.triton_kernels.sampled_gradient`."""
    # Rows of any other length are no whole number of 16-byte copies: each element would be a load of its own.
    missing = -input_IT.shape[1] % ALIGNED_TOKENS
    if missing:
        input_IT = F.pad(input_IT, (0, missing))
    return _gradient(grad_output_TO, input_IT.t(), indices_K, (1, 1))


def block_values_gradient(
    grad_output_TO: Tensor, input_TI: Tensor, blocks_U: Tensor, block_rows: int, block_cols: int
) -> Tensor:
    """See `kernels.triton_kernels.block_values_gradient`."""
    assert grad_output_TO.shape[1] % block_rows == 0 and input_TI.shape[1] % block_cols == 0
    return _gradient(grad_output_TO, input_TI, blocks_U, (block_rows, block_cols))
