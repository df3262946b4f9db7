"""The gradient of blocks against the whole dense gradient in fp64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sparse_ds.kernels.block_values_gradient as block_values_gradient_module
from sparse_ds.kernels.block_values_gradient import (
    block_values_gradient,
    dense_blocks,
    gathered_blocks,
    reference_block_values_gradient,
)
from sparse_ds.kernels.product_operands import ProductOperands
from sparse_ds.sparse.layout import SparseLayout

BLOCKS = [(1, 1), (1, 4), (2, 1), (3, 2), (4, 4)]


def random_case(
    num_tokens: int, grid: tuple[int, int], block: tuple[int, int], share: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    num_blocks = grid[0] * grid[1]
    num_active = {"none": 0, "one": 1, "few": -(-num_blocks // 5), "many": -(-num_blocks // 2), "all": num_blocks}
    indices = torch.randperm(num_blocks, generator=generator)[: num_active[share]].sort().values.int()
    grad_output = torch.randn(num_tokens, grid[0] * block[0], generator=generator)
    return grad_output, torch.randn(num_tokens, grid[1] * block[1], generator=generator), indices


def boundaries_of(grad_output: Tensor, input: Tensor, indices: Tensor, block: tuple[int, int]):  # type: ignore[no-untyped-def]
    layout = SparseLayout(grad_output.shape[1], input.shape[1], 0, block_rows=block[0], block_cols=block[1])
    return partial(layout.row_boundaries, indices)


@given(
    num_tokens=st.integers(1, 9),
    grid=st.tuples(st.integers(1, 7), st.integers(1, 6)),
    block=st.sampled_from(BLOCKS),
    share=st.sampled_from(["none", "one", "few", "many", "all"]),
    scratch_elements=st.sampled_from([1, 40, 10_000]),
    gathered_elements=st.sampled_from([1, 50, 10_000]),
    seed=st.integers(0, 99),
)
def test_every_path_equals_the_fp64_reference(
    num_tokens: int,
    grid: tuple[int, int],
    block: tuple[int, int],
    share: str,
    scratch_elements: int,
    gathered_elements: int,
    seed: int,
) -> None:
    grad_output, input, indices = random_case(num_tokens, grid, block, share, seed)
    boundaries = boundaries_of(grad_output, input, indices, block)
    expected = reference_block_values_gradient(grad_output, input, indices, *block)
    operands = ProductOperands(grad_output, input)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_values_gradient_module, "GATHERED_ELEMENTS", gathered_elements)
        results = [
            block_values_gradient(operands, indices, *block, boundaries, scratch_elements=scratch_elements),
            gathered_blocks(operands, indices, *block),
            dense_blocks(operands, indices, *block, boundaries, scratch_elements),
        ]
    for result in results:
        assert result.shape == (indices.numel() * block[0] * block[1],) and result.dtype == torch.float32
        # fp32 sums of at most 9 products of numbers below about 5.
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", ["few", "all"])
def test_bf16_rounds_each_sum_once(share: str) -> None:
    grad_output, input, indices = random_case(33, (6, 5), (4, 2), share)
    grad_output, input = grad_output.bfloat16(), input.bfloat16()
    boundaries = boundaries_of(grad_output, input, indices, (4, 2))
    result = block_values_gradient(ProductOperands(grad_output, input), indices, 4, 2, boundaries).double()
    # Rounding a sum to 8 bits of precision costs at most 2^-9 of it, the accumulation in fp32 far less.
    expected = reference_block_values_gradient(grad_output, input, indices, 4, 2)
    torch.testing.assert_close(result, expected, rtol=2**-8, atol=1e-4)
    assert not torch.equal(result, expected)


def test_only_the_active_blocks_are_computed_when_they_are_few() -> None:
    grad_output, input, _ = random_case(3, (4, 4), (2, 2), "none")
    grad_output[:, 2:], input[:, 4:] = torch.nan, torch.nan
    indices = torch.tensor([0, 1], dtype=torch.int32)
    boundaries = boundaries_of(grad_output, input, indices, (2, 2))
    result = block_values_gradient(ProductOperands(grad_output, input), indices, 2, 2, boundaries)
    assert bool(result.isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", ["few", "all"])
@pytest.mark.parametrize("block", [(16, 16), (1, 16), (8, 32), (3, 5)])
def test_on_a_gpu(block: tuple[int, int], share: str, dtype: torch.dtype) -> None:
    """With the kernel, and where there is none for the block, or too many blocks."""
    grad_output, input, indices = random_case(20, (6, 4), block, share)
    grad_output, input, indices = grad_output.to("cuda", dtype), input.to("cuda", dtype), indices.cuda()
    boundaries = boundaries_of(grad_output, input, indices, block)
    result = block_values_gradient(ProductOperands(grad_output, input), indices, *block, boundaries)
    expected = reference_block_values_gradient(grad_output, input, indices, *block)
    # fp32 products on a GPU may use TF32 inputs of 10 bits where that is allowed; 20 terms of size 1.
    torch.testing.assert_close(result.double(), expected, rtol=1e-2, atol=2e-2)
