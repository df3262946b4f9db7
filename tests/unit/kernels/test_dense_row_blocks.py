"""The dense gradient in blocks of rows, and the one buffer that they are written into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradient_cases import DENSE, computed, random_case

from sparse_ds.kernels import dense_row_blocks
from sparse_ds.kernels.dense_row_blocks import gradient_block, rows_per_block
from sparse_ds.kernels.product_operands import ProductOperands


@pytest.mark.parametrize(
    ("num_rows", "num_cols", "scratch_elements", "expected"),
    [(100, 10, 1000, 100), (100, 10, 999, 99), (100, 10, 9, 1), (3, 10, 10**6, 3), (1, 1, 1, 1)],
)
def test_rows_per_block_fills_the_scratch(num_rows: int, num_cols: int, scratch_elements: int, expected: int) -> None:
    assert rows_per_block(num_rows, num_cols, scratch_elements) == expected


@pytest.mark.parametrize("transposed_before", [False, True])
def test_blocks_are_the_rows_of_the_product(transposed_before: bool) -> None:
    grad_output, input, _ = random_case(6, 10, 7, 0)
    operands = ProductOperands(grad_output, input)
    if transposed_before:
        assert torch.equal(operands.grad_output_OT, grad_output.t())
    whole = grad_output.t() @ input
    out = torch.empty(4, 7)
    for first_row, num_rows in ((0, 4), (4, 4), (8, 2)):
        expected = whole[first_row : first_row + num_rows]
        torch.testing.assert_close(gradient_block(operands, first_row, 4), expected, rtol=1e-6, atol=1e-6)
        block = gradient_block(operands, first_row, 4, out=out)
        assert block.data_ptr() == out.data_ptr() and block.shape == (num_rows, 7)
        torch.testing.assert_close(block, expected, rtol=1e-6, atol=1e-6)


def test_one_buffer_serves_all_blocks_of_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_row_blocks, "SCRATCH_ELEMENTS", 100)
    written: list[tuple[int, int]] = []
    compute_block = dense_row_blocks.gradient_block

    def noted(operands: ProductOperands, first_row: int, num_rows: int, **rest: Any) -> torch.Tensor:
        block = compute_block(operands, first_row, num_rows, **rest)
        written.append((block.data_ptr(), block.numel()))
        return block

    monkeypatch.setattr(dense_row_blocks, "gradient_block", noted)
    for num_rows, num_cols, num_blocks in ((30, 20, 6), (17, 9, 2)):
        written.clear()
        computed(*random_case(5, num_rows, num_cols, num_rows * num_cols), DENSE)
        assert len(written) == num_blocks
        assert len({address for address, _ in written}) == 1 and max(size for _, size in written) <= 100


def test_a_row_wider_than_the_bound_is_a_block() -> None:
    case = random_case(3, 4, 50, 60)
    torch.testing.assert_close(computed(*case, DENSE, 10), computed(*case, DENSE, 1000), rtol=1e-6, atol=1e-6)
