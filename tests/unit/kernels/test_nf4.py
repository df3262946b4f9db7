"""Our flat NF4 tensors hold what bitsandbytes' own state object holds."""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes.functional as bnb
import pytest
import torch

from sparse_ds.kernels.nf4 import dequantize_nf4, nf4_code, nf4_sizes, quantize_nf4

SHAPES = [(1, 1), (1, 2), (3, 7), (5, 13), (8, 8), (64, 64), (33, 129), (130, 127)]
"""Odd numbers of weights, part blocks of 64, and (130 x 127) more than one second-level block of 256 scales."""


@pytest.fixture(autouse=True)
def without_compiler() -> Iterator[None]:
    """For odd numbers of columns bitsandbytes compiles a CPU kernel per shape; here it runs uncompiled."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("double_quantization", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_direct_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, double_quantization: bool) -> None:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) / 20).to(dtype)
    quantized = quantize_nf4(weight, double_quantization=double_quantization)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double_quantization, quant_type="nf4")
    assert torch.equal(quantized.packed, packed.view(-1))
    # bitsandbytes transposes a matrix of one packed byte (1 x 2); its elements are in the same order.
    expected = bnb.dequantize_4bit(packed, state).reshape(shape)
    result = dequantize_nf4(quantized.packed, quantized.absmax, quantized.nested_statistics, shape=shape, dtype=dtype)
    assert result.dtype == dtype and result.shape == torch.Size(shape) and result.is_contiguous()
    assert torch.equal(result, expected)
    assert result.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 32), (12, 48), (5, 96), (2, 34), (7, 66), (64, 96)])
def test_equals_the_formula(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """code * scale of its block of 64, whatever the number of columns."""
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) / 20).to(dtype)
    stored = quantize_nf4(weight, double_quantization=False)
    codes = torch.stack([stored.packed >> 4, stored.packed & 15], dim=1).view(-1)[: weight.numel()]
    scales = stored.absmax.repeat_interleave(64)[: weight.numel()]
    expected = (nf4_code()[codes.long()] * scales).to(dtype).view(shape)
    assert torch.equal(dequantize_nf4(stored.packed, stored.absmax, None, shape=shape, dtype=dtype), expected)


@pytest.mark.parametrize("double_quantization", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_stored_tensors_have_the_announced_sizes_and_dtypes(shape: tuple[int, int], double_quantization: bool) -> None:
    quantized = quantize_nf4(torch.randn(shape), double_quantization=double_quantization)
    sizes = nf4_sizes(shape[0] * shape[1])
    assert quantized.packed.shape == (sizes.packed,) and quantized.packed.dtype == torch.uint8
    assert quantized.absmax.shape == (sizes.absmax,)
    assert quantized.absmax.dtype == (torch.uint8 if double_quantization else torch.float32)
    if double_quantization:
        assert quantized.nested_statistics is not None
        assert quantized.nested_statistics.shape == (sizes.nested_statistics,)
        assert quantized.nested_statistics.dtype == torch.float32
    else:
        assert quantized.nested_statistics is None
    assert quantized.shape == shape and quantized.dtype == torch.float32


def test_the_offset_of_double_quantization_does_not_depend_on_threads() -> None:
    """torch's mean of more than 2^15 numbers does, and then all scales would."""
    weight = torch.randn(2**21, generator=torch.Generator().manual_seed(0))
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        _, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        torch.set_num_threads(2)
        quantized = quantize_nf4(weight, double_quantization=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(num_threads)
    assert quantized.nested_statistics is not None
    assert torch.equal(quantized.nested_statistics[-1], state.offset)
    assert torch.equal(quantized.absmax, state.absmax)


@pytest.mark.parametrize("double_quantization", [False, True])
def test_a_copy_of_the_tensors_is_enough(double_quantization: bool) -> None:
    """Nothing hides in objects: tensors that went through bytes (as ZeRO-3 gathers them) give the same weight."""
    weight = torch.randn(37, 71).bfloat16()
    quantized = quantize_nf4(weight, double_quantization=double_quantization)
    stored = [quantized.packed, quantized.absmax, quantized.nested_statistics]
    copies = [None if t is None else t.view(torch.uint8).clone().view(t.dtype) for t in stored]
    first = dequantize_nf4(*stored, shape=quantized.shape, dtype=quantized.dtype)
    assert torch.equal(dequantize_nf4(*copies, shape=quantized.shape, dtype=quantized.dtype), first)
    # The widest gap between the 16 codes is 0.304 of the block's largest weight, so the error is half of it; the
    # second level adds 8-bit errors of the scale.
    largest = weight.float().abs().max()
    assert float((first.float() - weight.float()).abs().max()) <= 0.17 * largest


def test_a_weight_that_is_not_contiguous_is_quantized_as_it_looks() -> None:
    weight = torch.randn(12, 20).t()
    direct = quantize_nf4(weight.contiguous(), double_quantization=False)
    assert torch.equal(quantize_nf4(weight, double_quantization=False).packed, direct.packed)
