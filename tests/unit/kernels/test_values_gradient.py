"""The gradient of the values against the whole dense gradient in fp64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_ds.kernels.product_operands import ProductOperands
from sparse_ds.kernels.values_gradient import reference_values_gradient, rows_per_block, values_gradient
from sparse_ds.sparse.layout import SparseLayout


def blockwise(
    grad_output: torch.Tensor, input: torch.Tensor, indices: torch.Tensor, scratch_elements: int
) -> torch.Tensor:
    layout = SparseLayout(grad_output.shape[1], input.shape[1], indices.numel())
    row_boundaries = partial(layout.row_boundaries, indices)
    operands = ProductOperands(grad_output, input)
    return values_gradient(operands, indices, row_boundaries, scratch_elements=scratch_elements)


def random_case(
    num_tokens: int, num_rows: int, num_cols: int, num_active: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(num_rows * num_cols, generator=generator)[:num_active].sort().values
    grad_output = torch.randn(num_tokens, num_rows, generator=generator)
    return grad_output, torch.randn(num_tokens, num_cols, generator=generator), indices.int()


@given(
    num_tokens=st.integers(1, 9),
    num_rows=st.integers(1, 23),
    num_cols=st.integers(1, 19),
    share=st.sampled_from(["none", "one", "some", "all"]),
    scratch_elements=st.sampled_from([1, 7, 40, 10_000]),
    seed=st.integers(0, 99),
)
def test_equals_the_fp64_reference(
    num_tokens: int, num_rows: int, num_cols: int, share: str, scratch_elements: int, seed: int
) -> None:
    num_elements = num_rows * num_cols
    num_active = {"none": 0, "one": 1, "some": -(-num_elements // 3), "all": num_elements}[share]
    grad_output, input, indices = random_case(num_tokens, num_rows, num_cols, num_active, seed)
    result = blockwise(grad_output, input, indices, scratch_elements)
    assert result.shape == (num_active,) and result.dtype == torch.float32
    # fp32 sums of at most 9 products of numbers below about 5.
    expected = reference_values_gradient(grad_output, input, indices)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scratch_elements", [1, 50, 200, 10**6])
def test_bf16_rounds_each_sum_once(scratch_elements: int) -> None:
    grad_output, input, indices = random_case(33, 17, 21, 120)
    grad_output, input = grad_output.bfloat16(), input.bfloat16()
    result = blockwise(grad_output, input, indices, scratch_elements).double()
    expected = reference_values_gradient(grad_output, input, indices)
    # The products accumulate in fp32; rounding the sum to 8 bits of precision costs at most 2^-9 of it, and the fp32
    # accumulation of 33 products far less (2^-24 each of terms below 20).
    torch.testing.assert_close(result, expected, rtol=2**-8, atol=1e-4)
    assert not torch.equal(result, expected)


def test_long_indices_and_int32_indices_give_the_same() -> None:
    grad_output, input, indices = random_case(4, 6, 5, 11)
    assert torch.equal(blockwise(grad_output, input, indices, 10), blockwise(grad_output, input, indices.long(), 10))


def test_blocks_without_indices_are_not_computed() -> None:
    """Rows 4 to 7 have none: with NaN there, the result is still finite."""
    grad_output, input, _ = random_case(3, 8, 5, 0)
    grad_output[:, 4:] = torch.nan
    result = blockwise(grad_output, input, torch.tensor([0, 7, 19], dtype=torch.int32), scratch_elements=20)
    assert bool(result.isfinite().all())


@pytest.mark.parametrize(
    ("num_rows", "num_cols", "scratch_elements", "expected"),
    [(100, 10, 1000, 100), (100, 10, 999, 99), (100, 10, 9, 1), (3, 10, 10**6, 3), (1, 1, 1, 1)],
)
def test_rows_per_block_fills_the_scratch(num_rows: int, num_cols: int, scratch_elements: int, expected: int) -> None:
    assert rows_per_block(num_rows, num_cols, scratch_elements) == expected
