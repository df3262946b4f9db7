"""Put deltas into a dense weight and take them out again, one pass each.

The plain way is `index_select` (saved), a conversion, an addition, a conversion and `index_copy_`, with the indices as
int64: six kernels. Here one kernel reads index, weight and value, and writes the saved and the merged weight. Positions
are unique, so no two threads write one weight.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_ds.kernels.triton_kernels.rounding import INTERPRETED, rounded

VALUES_PER_PROGRAM = 1024


@triton.jit
def _weight_position(positions, k, mask, num_cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Flat position in the weight of value `k`."""
    if BLOCK_ROWS * BLOCK_COLS == 1:
        position = tl.load(positions + k, mask=mask, other=0)
    else:
        block = tl.load(positions + k // (BLOCK_ROWS * BLOCK_COLS), mask=mask, other=0).to(tl.int64)
        inside = k % (BLOCK_ROWS * BLOCK_COLS)
        blocks_per_row = num_cols // BLOCK_COLS
        row = block // blocks_per_row * BLOCK_ROWS + inside // BLOCK_COLS
        position = row * num_cols + block % blocks_per_row * BLOCK_COLS + inside % BLOCK_COLS
    return position


@triton.jit
def put_kernel(
    weight,
    positions,
    values,
    saved,
    num_values,
    num_cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VALUES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    k = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    mask = k < num_values
    position = _weight_position(positions, k, mask, num_cols, BLOCK_ROWS, BLOCK_COLS)
    base = tl.load(weight + position, mask=mask, other=0.0)
    merged = base.to(tl.float32) + tl.load(values + k, mask=mask, other=0.0)
    tl.store(saved + k, base, mask=mask)
    tl.store(weight + position, rounded(merged, base.dtype, INTERPRETED), mask=mask)


@triton.jit
def put_back_kernel(
    weight,
    positions,
    saved,
    num_values,
    num_cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VALUES: tl.constexpr,
):
    k = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    mask = k < num_values
    position = _weight_position(positions, k, mask, num_cols, BLOCK_ROWS, BLOCK_COLS)
    tl.store(weight + position, tl.load(saved + k, mask=mask, other=0.0), mask=mask)


def put_deltas_(weight_OI: Tensor, indices_K: Tensor, values_K: Tensor, block_rows: int, block_cols: int) -> Tensor:
    """See `kernels.triton_kernels.put_deltas_`."""
    block_rows, block_cols = _block(values_K, block_rows, block_cols)
    assert weight_OI.is_contiguous() and indices_K.is_contiguous() and values_K.is_contiguous()
    assert values_K.dtype == torch.float32 and values_K.numel() == indices_K.numel() * block_rows * block_cols
    saved_K = torch.empty(values_K.shape, dtype=weight_OI.dtype, device=weight_OI.device)
    num_values = values_K.numel()
    if num_values:
        put_kernel[(triton.cdiv(num_values, VALUES_PER_PROGRAM),)](
            weight_OI,
            indices_K,
            values_K,
            saved_K,
            num_values,
            weight_OI.shape[-1],
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            VALUES=VALUES_PER_PROGRAM,
            INTERPRETED=INTERPRETED,
            enable_fp_fusion=False,
        )
    return saved_K


def put_back_(weight_OI: Tensor, indices_K: Tensor, saved_K: Tensor, block_rows: int, block_cols: int) -> None:
    """See `kernels.triton_kernels.put_back_`."""
    block_rows, block_cols = _block(saved_K, block_rows, block_cols)
    assert weight_OI.is_contiguous() and indices_K.is_contiguous() and saved_K.is_contiguous()
    assert saved_K.dtype == weight_OI.dtype and saved_K.numel() == indices_K.numel() * block_rows * block_cols
    num_values = saved_K.numel()
    if num_values:
        put_back_kernel[(triton.cdiv(num_values, VALUES_PER_PROGRAM),)](
            weight_OI,
            indices_K,
            saved_K,
            num_values,
            weight_OI.shape[-1],
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            VALUES=VALUES_PER_PROGRAM,
            enable_fp_fusion=False,
        )


def _block(values_K: Tensor, block_rows: int, block_cols: int) -> tuple[int, int]:
    """Values [strips, n] are those of blocks of 1 x n."""
    if values_K.dim() == 2 and block_rows * block_cols == 1:
        return 1, values_K.shape[1]
    return block_rows, block_cols
