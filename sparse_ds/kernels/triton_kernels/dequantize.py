"""NF4 to dense with the deltas in it: one pass over the matrix, the bits of bitsandbytes' kernel and a put after it.

A program makes TILE consecutive weights. The indices are ascending, so the deltas of a tile are one slice of them,
found beforehand for all tiles by one `searchsorted`. They are written after the tile, behind a barrier; their base
weight is dequantized again from the four bits (which are in the cache), not read back.

    dense   = round(code[four bits] * scale)
    scale   = absmax, or with double quantization scale_code[absmax] * nested[block / 256] + offset
    merged  = round(fp32 dense + value)

The fp32 operations are rounded one by one: no fused multiply-add (`enable_fp_fusion=False`).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_ds.kernels.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, nf4_code, scale_code
from sparse_ds.kernels.triton_kernels.put_deltas import put_deltas_
from sparse_ds.kernels.triton_kernels.rounding import INTERPRETED, rounded

TILE = 4096
"""Weights per program."""
PART = 1024
"""Weights that a program makes at one time: 8 a thread, one 16-byte store in 16 bits."""
DELTAS = 128
"""Deltas that a program puts in at one time."""


@triton.jit
def _scale(absmax, nested, scale_codes, block, mask, num_nested, NESTED: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr):
    """fp32 scale of quantization block `block`."""
    if NESTED:
        code = tl.load(absmax + block, mask=mask, other=0).to(tl.int32)
        share = tl.load(scale_codes + code)
        scale = share * tl.load(nested + block // NESTED_BLOCK_SIZE, mask=mask, other=0.0)
        scale += tl.load(nested + num_nested - 1)
    else:
        scale = tl.load(absmax + block, mask=mask, other=0.0)
    return scale


@triton.jit
def dequantize_kernel(
    packed,
    absmax,
    nested,
    codes,
    scale_codes,
    tile_begins,
    indices,
    values,
    dense,
    num_weights,
    num_bytes,
    num_nested,
    NESTED: tl.constexpr,
    HAS_DELTAS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    DELTAS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tile = tl.program_id(0)
    start = tile.to(tl.int64) * TILE
    dtype = dense.dtype.element_ty
    for part in tl.static_range(TILE // PART):
        begin = start + part * PART
        # [blocks, bytes of a block]: one scale a row. The last byte of the matrix may hold one weight only.
        block = begin // BLOCK_SIZE + tl.arange(0, PART // BLOCK_SIZE)
        scale = _scale(
            absmax, nested, scale_codes, block, block * BLOCK_SIZE < num_weights, num_nested, NESTED, NESTED_BLOCK_SIZE
        )
        byte = (block * (BLOCK_SIZE // 2))[:, None] + tl.arange(0, BLOCK_SIZE // 2)[None, :]
        two = tl.load(packed + byte, mask=byte < num_bytes, other=0).to(tl.int32)
        first = rounded(tl.load(codes + (two >> 4)) * scale[:, None], dtype, INTERPRETED)
        second = rounded(tl.load(codes + (two & 15)) * scale[:, None], dtype, INTERPRETED)
        weight = (block * BLOCK_SIZE)[:, None] + tl.arange(0, BLOCK_SIZE)[None, :]
        tl.store(dense + weight, tl.interleave(first, second), mask=weight < num_weights)
    if HAS_DELTAS:
        first_delta = tl.load(tile_begins + tile)
        end = tl.load(tile_begins + tile + 1)
        if first_delta < end:
            tl.debug_barrier()  # the tile is written before its deltas overwrite it
            for chunk in range(first_delta, end, DELTAS):
                k = chunk + tl.arange(0, DELTAS)
                mask = k < end
                index = tl.load(indices + k, mask=mask, other=0).to(tl.int64)
                pair = tl.load(packed + index // 2, mask=mask, other=0).to(tl.int32)
                four_bits = tl.where(index % 2 == 0, pair >> 4, pair & 15)
                its_scale = _scale(
                    absmax, nested, scale_codes, index // BLOCK_SIZE, mask, num_nested, NESTED, NESTED_BLOCK_SIZE
                )
                base = rounded(tl.load(codes + four_bits) * its_scale, dtype, INTERPRETED)
                merged = base.to(tl.float32) + tl.load(values + k, mask=mask, other=0.0)
                tl.store(dense + index, rounded(merged, dtype, INTERPRETED), mask=mask)


def tile_begins(indices_K: Tensor, num_weights: int) -> Tensor:
    """[tiles + 1] int32: the position in the ascending indices at which the deltas of each tile begin, then K.

    Valid until the indices change: 1 byte per 1024 weights, worth keeping with them.
    """
    num_tiles = triton.cdiv(num_weights, TILE)
    starts = (torch.arange(num_tiles + 1, device=indices_K.device) * TILE).clamp_(max=num_weights)
    return torch.searchsorted(indices_K, starts.to(indices_K.dtype), out_int32=True)


def dequantize_with_deltas(
    packed: Tensor,
    absmax: Tensor,
    nested_statistics: Tensor | None,
    indices_K: Tensor,
    values_K: Tensor,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    begins: Tensor | None,
) -> Tensor:
    """See `kernels.triton_kernels.dequantize_with_deltas`."""
    if values_K.dim() == 2:  # of strips, whose positions need not ascend
        nothing = indices_K[:0], values_K.view(-1)[:0]
        dense_OI = dequantize_with_deltas(
            packed, absmax, nested_statistics, *nothing, shape=shape, dtype=dtype, begins=None
        )
        put_deltas_(dense_OI, indices_K, values_K, 1, 1)
        return dense_OI
    assert indices_K.numel() == values_K.numel() and values_K.dtype == torch.float32
    dense_OI = torch.empty(shape, dtype=dtype, device=packed.device)
    num_weights = dense_OI.numel()
    if not num_weights:
        return dense_OI
    if begins is None and indices_K.numel():
        begins = tile_begins(indices_K, num_weights)
    nested = nested_statistics is not None
    dequantize_kernel[(triton.cdiv(num_weights, TILE),)](
        packed,
        absmax,
        nested_statistics if nested else absmax,
        nf4_code(packed.device),
        scale_code(packed.device) if nested else absmax,
        indices_K if begins is None else begins,
        indices_K,
        values_K,
        dense_OI,
        num_weights,
        packed.numel(),
        nested_statistics.numel() if nested_statistics is not None else 0,
        NESTED=nested,
        HAS_DELTAS=indices_K.numel() > 0,
        BLOCK_SIZE=BLOCK_SIZE,
        NESTED_BLOCK_SIZE=NESTED_BLOCK_SIZE,
        TILE=TILE,
        PART=PART,
        DELTAS=DELTAS,
        INTERPRETED=INTERPRETED,
        enable_fp_fusion=False,
    )
    return dense_OI
