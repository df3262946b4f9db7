"""Deltas go into a buffer with one rounding and come out without a trace."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_ds.kernels.apply_deltas import apply_deltas_, deltas_applied, hidden_counts, merged_values

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def buffer_and_deltas(dtype: torch.dtype, num_active: int = 20) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 9, generator=generator).to(dtype)
    # Bit patterns that a sum would not bring back: -0, NaN, Inf and a subnormal number.
    weight.view(-1)[:4] = torch.tensor([-0.0, math.nan, math.inf, 1e-7]).to(dtype)
    others = 4 + torch.randperm(59, generator=generator)[: max(num_active - 4, 0)]
    indices = torch.cat([torch.arange(min(num_active, 4)), others]).sort().values.int()
    return weight, indices, torch.randn(num_active, generator=generator)


def bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous().view(torch.uint8).clone()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_active", [0, 1, 20, 63])
def test_inside_merged_and_afterwards_as_before(dtype: torch.dtype, num_active: int) -> None:
    weight, indices, values = buffer_and_deltas(dtype, num_active)
    before, bits_before = weight.clone(), bits(weight)
    with deltas_applied(weight, indices, values) as merged:
        assert merged.data_ptr() == weight.data_ptr(), "a second dense copy"
        expected = before.double()
        expected.view(-1)[indices.long()] += values.double()
        finite = expected.isfinite()
        # The exact sum, rounded once to the buffer's dtype (fp32 in between may round before: one unit at most).
        torch.testing.assert_close(merged[finite].double(), expected[finite].to(dtype).double(), rtol=2**-8, atol=1e-6)
        untouched = torch.ones(63, dtype=torch.bool)
        untouched[indices.long()] = False
        assert torch.equal(bits(merged.view(-1)[untouched]), bits(before.view(-1)[untouched]))
        if num_active > 4:
            assert not torch.equal(bits(merged), bits_before)
    assert torch.equal(bits(weight), bits_before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_restored_on_errors_and_interrupts(dtype: torch.dtype) -> None:
    weight, indices, values = buffer_and_deltas(dtype)
    bits_before = bits(weight)
    for error in (ValueError("in the product"), KeyboardInterrupt()):
        with pytest.raises(type(error)), deltas_applied(weight, indices, values):
            raise error
        assert torch.equal(bits(weight), bits_before)


def test_nested_use_unwinds_in_order() -> None:
    weight, indices, values = buffer_and_deltas(torch.bfloat16)
    bits_before = bits(weight)
    with deltas_applied(weight, indices, values), deltas_applied(weight, indices, values):
        pass
    assert torch.equal(bits(weight), bits_before)


def test_merged_weight_is_the_fp32_sum_rounded_once() -> None:
    """1 + 2^-8 + 2^-9: rounding the value to bf16 first, or adding in bf16, gives another weight."""
    weights = torch.tensor([1.0, 1.0, 0.02]).bfloat16()
    values = torch.tensor([2**-8 + 2**-16, 2**-9, 1e-5])
    assert merged_values(weights, values).tolist() == [1 + 2**-7, 1.0, weights[2].item()]
    assert merged_values(weights, values).dtype == torch.bfloat16


def test_hidden_counts_leaves_zeros_out() -> None:
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0]).bfloat16()
    values = torch.tensor([0.0, 2**-10, 2**-6, 1e-30])
    assert hidden_counts(weights, values) == (1, 3)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_apply_deltas_in_place_equals_the_context(index_dtype: torch.dtype) -> None:
    weight, indices, values = buffer_and_deltas(torch.bfloat16)
    indices = indices.to(index_dtype)
    with deltas_applied(weight, indices, values) as merged:
        expected = bits(merged)
    result = apply_deltas_(weight, indices, values)
    assert result.data_ptr() == weight.data_ptr()
    assert torch.equal(bits(result), expected)
