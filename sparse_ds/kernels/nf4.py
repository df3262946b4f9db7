"""NF4: 4-bit NormalFloat quantization of one weight matrix, through bitsandbytes.

bitsandbytes keeps the statistics of a quantized tensor in a `QuantState` object. ZeRO-3 partitions parameters, not
objects, so here everything that is O(numel) is a plain tensor and only constants are rebuilt on the fly:

    packed             uint8 [ceil(N / 2)]          two 4-bit codes a byte
    absmax             fp32  [ceil(N / 64)]         one scale per block of 64 weights; uint8 with double quantization
    nested_statistics  fp32  [ceil(B / 256) + 1]    double quantization only: scale of each 256 of the B entries of
                                                    `absmax`, then the offset (their mean) as the last entry

Reference: QLoRA: Efficient Finetuning of Quantized LLMs (Dettmers et al. 2023, arXiv 2305.14314), section 3.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

BLOCK_SIZE = 64
"""Weights per fp32 scale (QLoRA, section 3)."""
CPU = torch.device("cpu")
NESTED_BLOCK_SIZE = 256
"""Scales per second-level scale under double quantization (QLoRA, section 3)."""


@dataclass(frozen=True)
class NF4Tensor:
    """One quantized matrix: the tensors of the module docstring, and what is needed to read them."""

    packed: Tensor
    absmax: Tensor
    nested_statistics: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class NF4Sizes:
    """Number of elements of each stored tensor of a matrix with `num_elements` weights."""

    packed: int
    absmax: int
    nested_statistics: int


def nf4_sizes(num_elements: int) -> NF4Sizes:
    """Sizes (in elements) of the tensors that store `num_elements` weights."""
    num_blocks = -(-num_elements // BLOCK_SIZE)
    return NF4Sizes(
        packed=-(-num_elements // 2), absmax=num_blocks, nested_statistics=-(-num_blocks // NESTED_BLOCK_SIZE) + 1
    )


def quantize_blocks(weights_N: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize whole blocks of a flat weight: what a block becomes does not depend on the others.

    Args:
        weights_N: [N], bf16, fp16 or fp32, beginning at a multiple of 64 of the matrix and ending at one or at its end.

    Returns:
        (packed uint8 [ceil(N / 2)], scales fp32 [ceil(N / 64)]).
    """
    packed, state = bnb.quantize_4bit(weights_N.contiguous(), blocksize=BLOCK_SIZE, quant_type="nf4")
    return packed.reshape(-1), state.absmax


def scales_offset(scales_B: Tensor) -> Tensor:
    """The offset of double quantization: the mean of all scales of a matrix, a scalar fp32 tensor.

    On the CPU torch's mean depends on the number of threads in its last digits. Here it is always that of one thread,
    so that ranks and machines with any number of cores agree (and with bitsandbytes, when it has one thread).
    """
    if scales_B.device.type != "cpu":
        return scales_B.mean()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return scales_B.mean()
    finally:
        torch.set_num_threads(num_threads)


def quantize_scales(scales_B: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The second level of double quantization, of whole blocks of 256 scales: they do not depend on each other.

    Args:
        scales_B: fp32 [B], beginning at a multiple of 256 of the matrix's scales and ending at one or at their end.
        offset: from `scales_offset` of all of them.

    Returns:
        (codes uint8 [B], scales of the scales fp32 [ceil(B / 256)]).
    """
    codes_B, state = bnb.quantize_blockwise(scales_B - offset, blocksize=NESTED_BLOCK_SIZE)
    return codes_B, state.absmax.float()


def quantize_nf4(weight: Tensor, *, double_quantization: bool) -> NF4Tensor:
    """Quantize `weight` to NF4 in blocks of 64.

    Args:
        weight: [O, I], bf16, fp16 or fp32, on any device that bitsandbytes supports.
        double_quantization: also quantize the scales to 8 bits (saves 0.37 bits per weight).

    Returns:
        The stored tensors, flat and contiguous, on the device of `weight`.
    """
    packed, absmax = quantize_blocks(weight.reshape(-1))
    nested_statistics = None
    if double_quantization:
        offset = scales_offset(absmax)
        absmax, nested_absmax = quantize_scales(absmax, offset)
        nested_statistics = torch.cat([nested_absmax, offset.reshape(1)])
    return NF4Tensor(packed, absmax, nested_statistics, tuple(weight.shape), weight.dtype)


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_statistics: Tensor | None,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Rebuild the dense matrix: the inverse of `quantize_nf4` up to the quantization error.

    Args:
        packed, absmax, nested_statistics: as in the module docstring.
        shape: (O, I) of the matrix.
        dtype: of the result; the same dtype as was quantized gives bitsandbytes' own rounding.

    Returns:
        A new contiguous tensor [O, I]; the caller may write into it.
    """
    num_elements = math.prod(shape)
    # bitsandbytes' CPU kernel (0.50.2) takes wrong scales for a matrix with, say, 32 or 96 columns, where blocks of 64
    # go over the ends of rows. As one row, or with a block a row, it is right; the elements are in the same order.
    flat_shape = (num_elements // BLOCK_SIZE, BLOCK_SIZE) if num_elements % BLOCK_SIZE == 0 else (1, num_elements)
    state = bnb.QuantState(
        absmax=absmax,
        shape=torch.Size(flat_shape),
        dtype=dtype,
        blocksize=BLOCK_SIZE,
        code=nf4_code(packed.device),
        quant_type="nf4",
    )
    if nested_statistics is not None:
        state.nested = True
        state.offset = nested_statistics[-1]
        state.state2 = bnb.QuantState(
            absmax=nested_statistics[:-1],
            blocksize=NESTED_BLOCK_SIZE,
            code=scale_code(packed.device),
            dtype=torch.float32,
        )
    dense: Tensor = bnb.dequantize_4bit(packed.reshape(-1, 1), quant_state=state)
    # A single packed byte looks to bitsandbytes like a transposed matrix.
    return dense.reshape(shape)


@functools.cache
def nf4_code(device: torch.device = CPU) -> Tensor:
    """[16] fp32, what a code means as a share of its block's scale."""
    code: Tensor = bnb.get_4bit_type("nf4", device=device)
    return code


@functools.cache
def scale_code(device: torch.device = CPU) -> Tensor:
    """[256] fp32, the same for a scale under double quantization."""
    code: Tensor = bnb.create_dynamic_map().to(device)
    return code
