"""The operations of `kernels` on an NVIDIA GPU, written in Triton; each has a plain reference in torch beside it.

Importing this package needs no triton: call `available(tensor)` first; the functions import what they need.

    function                  plain torch                                        saves on the GPU
    sampled_gradient          dense dY^T X, then a gather                        the dense product, at low density
    block_values_gradient     the same for whole blocks                          the same, at any density
    put_deltas_, put_back_    index_select, add, index_copy_                     two passes, int64 copies of the indices
    dequantize_with_deltas    bitsandbytes' dequantize_4bit, then put_deltas_    a pass over the merged entries

All of them are deterministic, accumulate in fp32 and start no host synchronization.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capable(device: torch.device) -> bool:
    """sm_80 (A100) or later: tensor cores with bf16, asynchronous copies."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def available(tensor: Tensor) -> bool:
    """Whether these kernels can work on `tensor`: on a GPU of sm_80 or later, or anywhere with TRITON_INTERPRET=1."""
    if not _installed():
        return False
    if tensor.is_cuda:
        return _capable(tensor.device)
    return os.environ.get("TRITON_INTERPRET") == "1"


def sampled_gradient(grad_output_TO: Tensor, input_IT: Tensor, indices_K: Tensor) -> Tensor:
    """`g_k = sum_t dY[t, row(k)] * X[t, col(k)]` for ascending single indices.

    Args:
        grad_output_TO: [T, O] contiguous; bf16, fp16 or fp32.
        input_IT: [I, T] contiguous, the transposed input, same dtype. Where T is no multiple of 16 a copy of it is made
            that is wider; one that comes with zeros behind its T columns, up to a multiple of 16, is taken as it is.
        indices_K: [K] flat row-major positions of [O, I], ascending, int32 or int64. Repeated ones are allowed.

    Returns:
        [K] fp32.
    """
    from sparse_ds.kernels.triton_kernels.block_gradient import sampled_gradient as launch

    return launch(grad_output_TO, input_IT, indices_K)


def block_values_gradient(
    grad_output_TO: Tensor, input_TI: Tensor, blocks_U: Tensor, block_rows: int, block_cols: int
) -> Tensor:
    """The gradient of whole blocks of the weight.

    Args:
        grad_output_TO: [T, O] contiguous; bf16, fp16 or fp32.
        input_TI: [T, I] contiguous, same dtype, not transposed.
        blocks_U: [U] positions on the grid [O / block_rows, I / block_cols], row-major, ascending, int32 or int64.
        block_rows, block_cols: powers of two that divide O and I, at most 64 (see `supports_block`).

    Returns:
        fp32 [U * block_rows * block_cols], block after block, row-major inside.
    """
    from sparse_ds.kernels.triton_kernels.block_gradient import block_values_gradient as launch

    return launch(grad_output_TO, input_TI, blocks_U, block_rows, block_cols)


def supports_block(block_rows: int, block_cols: int) -> bool:
    """Whether `block_values_gradient` has a kernel for this block: powers of two up to 64, 8 columns at least."""
    powers = all(1 <= n <= 64 and n & (n - 1) == 0 for n in (block_rows, block_cols))
    return powers and block_cols >= 8


def put_deltas_(
    weight_OI: Tensor, indices_K: Tensor, values_K: Tensor, block_rows: int = 1, block_cols: int = 1
) -> Tensor:
    """Write `round(fp32 w + fp32 value)` at the indices, in place and in one pass.

    Args:
        weight_OI: [O, I] contiguous; bf16, fp16 or fp32.
        indices_K: [K] flat row-major positions, unique, int32 or int64; with larger blocks [U] positions of blocks.
        values_K: [K] fp32; with larger blocks [U * block_rows * block_cols], block after block. Or [U, n]: then the
            positions are those of strips of n neighbours, that is, of blocks of 1 x n.

    Returns:
        The weights that were there, in the shape of `values_K`, for `put_back_`.
    """
    from sparse_ds.kernels.triton_kernels.put_deltas import put_deltas_ as launch

    return launch(weight_OI, indices_K, values_K, block_rows, block_cols)


def put_back_(weight_OI: Tensor, indices_K: Tensor, saved_K: Tensor, block_rows: int = 1, block_cols: int = 1) -> None:
    """Write the weights that `put_deltas_` returned where they were."""
    from sparse_ds.kernels.triton_kernels.put_deltas import put_back_ as launch

    launch(weight_OI, indices_K, saved_K, block_rows, block_cols)


def dequantize_with_deltas(
    packed: Tensor,
    absmax: Tensor,
    nested_statistics: Tensor | None,
    indices_K: Tensor,
    values_K: Tensor,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    begins: Tensor | None = None,
) -> Tensor:
    """`kernels.nf4.dequantize_nf4` and then the deltas put in, the same bits, in one pass over the matrix.

    Args:
        packed, absmax, nested_statistics: as in `kernels.nf4`.
        indices_K: [K] flat row-major positions, ascending, unique, int32 or int64.
        values_K: [K] fp32. Or [U, n] of strips, as in `put_deltas_`, in any order; they are put in by a second kernel.
        shape: (O, I).
        dtype: of the result.
        begins: `tile_begins(indices_K, O * I)`, where it was kept.

    Returns:
        A new contiguous tensor [O, I].
    """
    from sparse_ds.kernels.triton_kernels.dequantize import dequantize_with_deltas as launch

    return launch(packed, absmax, nested_statistics, indices_K, values_K, shape=shape, dtype=dtype, begins=begins)


def tile_begins(indices_K: Tensor, num_weights: int) -> Tensor:
    """What `dequantize_with_deltas` needs to know of the indices: 1 byte per 1024 weights, valid until they change."""
    from sparse_ds.kernels.triton_kernels.dequantize import tile_begins as find

    return find(indices_K, num_weights)
