"""What the Triton kernels compute, against fp64 and against the plain torch functions.

Run by test_triton_kernels.py in a process of its own: in Triton's interpreter (TRITON_INTERPRET=1, which has to be set
before triton is imported), or on a GPU, where the same cases have larger ones beside them.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from sparse_ds.kernels import triton_kernels
from sparse_ds.kernels.nf4 import dequantize_nf4, quantize_nf4
from sparse_ds.kernels.triton_kernels import block_gradient
from sparse_ds.sparse.layout import SparseLayout
from sparse_ds.sparse.sparse_linear import SparseLinear

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ON_GPU = DEVICE == "cuda"
GPU = pytest.mark.skipif(not ON_GPU, reason="minutes in the interpreter")
DTYPES = [torch.float32, torch.bfloat16] + ([torch.float16] if ON_GPU else [])
ALL = -1

TOLERANCE = 1e-5
"""Relative, of the whole gradient: the products of 16-bit numbers are exact in fp32, and so is what is left the error
of fp32 sums of up to 8192 terms (below 1e-6 in the interpreter; tensor cores cut instead of rounding)."""


@pytest.fixture(autouse=True)
def without_compiler() -> None:
    torch.compiler.set_stance("force_eager")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype).to(DEVICE)


def drawn(num_elements: int, count: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """`count` of them (or ALL), ascending."""
    count = num_elements if count == ALL else count
    return torch.randperm(num_elements, generator=generator(1))[:count].sort().values.to(dtype).to(DEVICE)


def assert_close(result: Tensor, expected: Tensor) -> None:
    assert result.dtype == torch.float32 and result.shape == expected.shape
    if expected.numel():
        error, size = float((result.double() - expected).norm()), float(expected.norm())
        assert error <= TOLERANCE * size, f"error {error:.2e} of {size:.2e}"


def sampled(grad_output_TO: Tensor, input_TI: Tensor, indices_K: Tensor) -> Tensor:
    return triton_kernels.sampled_gradient(grad_output_TO, input_TI.t().contiguous(), indices_K)


def dense_gradient(grad_output_TO: Tensor, input_TI: Tensor) -> Tensor:
    return grad_output_TO.double().t() @ input_TI.double()


# ---- gradient of single weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "rows", "cols", "count"),
    [
        (70, 37, 53, 300),  # nothing divides the tiles; several windows a program
        (64, 16, 16, ALL),
        (1, 5, 3, 4),
        (33, 5, 1000, 1),
        (40, 200, 64, 500),  # 2.5 a row: most programs need two windows
        (12, 1, 90, 40),
        (12, 90, 1, 40),
        (5, 700, 700, 66),  # nearly every entry in a window of its own
        (8, 9, 11, 0),
        (0, 9, 11, 20),
        pytest.param(2048, 4096, 4096, 16777, marks=GPU),
        pytest.param(2000, 4096, 1024, 50000, marks=GPU),
        pytest.param(8192, 1024, 4096, 4194, marks=GPU),
        pytest.param(517, 11008, 4096, 270000, marks=GPU),
    ],
)
def test_gradient_of_single_weights(dtype: torch.dtype, tokens: int, rows: int, cols: int, count: int) -> None:
    grad_output, input = normal(tokens, rows, dtype=dtype, seed=2), normal(tokens, cols, dtype=dtype, seed=3)
    indices = drawn(rows * cols, count)
    expected = dense_gradient(grad_output, input).reshape(-1)[indices.long()]
    result = sampled(grad_output, input, indices)
    assert_close(result, expected)
    assert torch.equal(sampled(grad_output, input, indices.long()), result)


def test_tokens_are_split_over_programs_where_entries_are_few() -> None:
    grad_output, input = normal(1100, 8, dtype=torch.bfloat16, seed=2), normal(1100, 8, dtype=torch.bfloat16, seed=3)
    indices = drawn(64, 20)
    result = sampled(grad_output, input, indices)
    assert_close(result, dense_gradient(grad_output, input).reshape(-1)[indices.long()])
    assert torch.equal(sampled(grad_output, input, indices), result)


def test_many_entries_take_the_larger_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """33 thousand are many; here already 256."""
    monkeypatch.setattr(block_gradient, "FEW_PROGRAMS", 2)
    grad_output, input = normal(6, 40, dtype=torch.bfloat16, seed=2), normal(6, 40, dtype=torch.bfloat16, seed=3)
    indices = drawn(1600, 700)
    assert block_gradient.tiling(700, 40, 1, 1, torch.bfloat16).group == 128
    assert_close(sampled(grad_output, input, indices), dense_gradient(grad_output, input).reshape(-1)[indices.long()])


def test_repeated_entries_and_rows_without_any() -> None:
    grad_output, input = normal(50, 300, seed=2), normal(50, 20, seed=3)
    indices = torch.tensor([7] * 30 + [20 * 150 + 3] * 40 + [20 * 299, 20 * 299 + 19], dtype=torch.int32, device=DEVICE)
    assert_close(sampled(grad_output, input, indices), dense_gradient(grad_output, input).reshape(-1)[indices.long()])


def test_what_is_not_a_number_stays_in_its_row_and_column() -> None:
    grad_output, input = normal(20, 30, seed=2), normal(20, 10, seed=3)
    grad_output[3, 4], input[5, 6] = torch.nan, torch.inf
    indices = drawn(300, ALL)
    result, expected = sampled(grad_output, input, indices), dense_gradient(grad_output, input).reshape(-1)
    assert torch.equal(result.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    assert_close(result[finite], expected[finite])


def test_operands_may_be_slices_of_wider_ones() -> None:
    wide_output, wide_input = normal(40, 64, dtype=torch.bfloat16, seed=2), normal(48, 64, dtype=torch.bfloat16, seed=3)
    grad_output, input_IT = wide_output[:, 16:48], wide_input[:, 8:48]
    indices = drawn(32 * 48, 100)
    expected = dense_gradient(grad_output, input_IT.t()).reshape(-1)[indices.long()]
    assert_close(triton_kernels.sampled_gradient(grad_output, input_IT, indices), expected)


def test_the_transposed_input_may_come_with_zeros_behind() -> None:
    grad_output, input = normal(21, 40, seed=2), normal(21, 30, seed=3)
    indices = drawn(1200, 100)
    wider = torch.nn.functional.pad(input.t(), (0, 11))
    result = triton_kernels.sampled_gradient(grad_output, wider, indices)
    assert torch.equal(result, sampled(grad_output, input, indices))


# ---- gradient of blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("block", "grid", "count", "tokens"),
    [
        ((16, 16), (4, 5), 7, 70),
        ((16, 16), (3, 2), ALL, 16),
        ((16, 16), (30, 2), 5, 20),
        ((16, 16), (2, 2), 0, 20),
        ((16, 16), (2, 2), 3, 0),
        ((1, 16), (30, 3), 40, 33),
        ((1, 16), (70, 2), 1, 33),
        ((2, 8), (9, 4), ALL, 100),
        ((8, 32), (3, 2), 4, 9),
        ((64, 64), (2, 2), 3, 33),
        ((16, 16), (2, 2), 3, 1100),
        pytest.param((16, 16), (256, 256), 1507, 2048, marks=GPU),
        pytest.param((1, 16), (4096, 256), 24117, 2000, marks=GPU),
        pytest.param((32, 32), (344, 128), 1012, 8192, marks=GPU),
    ],
)
def test_gradient_of_blocks(
    dtype: torch.dtype, block: tuple[int, int], grid: tuple[int, int], count: int, tokens: int
) -> None:
    (block_rows, block_cols), (grid_rows, grid_cols) = block, grid
    grad_output = normal(tokens, grid_rows * block_rows, dtype=dtype, seed=2)
    input = normal(tokens, grid_cols * block_cols, dtype=dtype, seed=3)
    blocks = drawn(grid_rows * grid_cols, count)
    dense = dense_gradient(grad_output, input)
    expected = dense.view(grid_rows, block_rows, grid_cols, block_cols).permute(0, 2, 1, 3)
    expected = expected.reshape(grid_rows * grid_cols, -1)[blocks.long()].reshape(-1)
    assert triton_kernels.supports_block(*block)
    result = triton_kernels.block_values_gradient(grad_output, input, blocks, *block)
    assert_close(result, expected)
    assert torch.equal(triton_kernels.block_values_gradient(grad_output, input, blocks.long(), *block), result)


# ---- deltas in and out


def plainly_merged(weight_OI: Tensor, indices_K: Tensor, values_K: Tensor) -> Tensor:
    """The merged weight; the given one stays as it is."""
    flat_N, positions_K = weight_OI.reshape(-1).clone(), indices_K.long()
    flat_N[positions_K] = (flat_N[positions_K].float() + values_K).to(weight_OI.dtype)
    return flat_N.view(weight_OI.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "cols", "count"),
    [
        (3, 7, 4),
        (1, 1, 1),
        (9, 9, 0),
        (40, 41, ALL),
        (130, 127, 3000),
        pytest.param(4096, 11008, 270000, marks=GPU),
    ],
)
def test_deltas_are_put_in_and_taken_out(dtype: torch.dtype, rows: int, cols: int, count: int) -> None:
    weight, indices = normal(rows, cols, dtype=dtype, seed=4), drawn(rows * cols, count)
    values, original = normal(indices.numel(), seed=5) / 10, weight.clone()
    expected = plainly_merged(original, indices, values)
    for taken in (indices, indices.long()):
        saved = triton_kernels.put_deltas_(weight, taken, values)
        assert torch.equal(weight, expected)
        assert torch.equal(saved, original.view(-1)[indices.long()])
        triton_kernels.put_back_(weight, taken, saved)
        assert torch.equal(weight, original)


@pytest.mark.parametrize("block", [(16, 16), (1, 16), (3, 5)])
def test_blocks_are_put_in_and_taken_out(block: tuple[int, int]) -> None:
    (block_rows, block_cols), (grid_rows, grid_cols) = block, (5, 7)
    weight = normal(grid_rows * block_rows, grid_cols * block_cols, dtype=torch.bfloat16, seed=4)
    blocks, original = drawn(grid_rows * grid_cols, 11), weight.clone()
    values = normal(blocks.numel() * block_rows * block_cols, seed=5) / 10
    expected = original.clone()
    for block_values, position in zip(values.view(-1, block_rows, block_cols), blocks.tolist(), strict=True):
        row, col = position // grid_cols * block_rows, position % grid_cols * block_cols
        part = expected[row : row + block_rows, col : col + block_cols]
        part.copy_((part.float() + block_values).to(part.dtype))
    saved = triton_kernels.put_deltas_(weight, blocks, values, *block)
    assert torch.equal(weight, expected)
    triton_kernels.put_back_(weight, blocks, saved, *block)
    assert torch.equal(weight, original)
    if block_rows == 1:  # strips, given by the shape of the values
        saved = triton_kernels.put_deltas_(weight, blocks, values.view(-1, block_cols))
        assert saved.shape == (11, block_cols) and torch.equal(weight, expected)
        triton_kernels.put_back_(weight, blocks, saved)
        assert torch.equal(weight, original)


def test_ties_and_large_numbers_are_rounded_as_torch_rounds() -> None:
    """Sums half way between two bf16 numbers, and such that overflow to infinity."""
    small = 1e-40 if ON_GPU else 0.0  # the interpreter reads bf16 below 2^-126 wrong
    base = torch.tensor([1.0, 1.0, 1.0, -1.0, 3e38, -3e38, 0.0, small], device=DEVICE).bfloat16()
    values = torch.tensor([2**-8, 3 * 2**-8, 2**-8 + 2**-20, -(2**-8), 3e38, -3e38, -0.0, small], device=DEVICE)
    expected = (base.float() + values).bfloat16()
    triton_kernels.put_deltas_(base.view(1, 8), torch.arange(8, dtype=torch.int32, device=DEVICE), values)
    assert torch.equal(base.view(torch.int16), expected.view(torch.int16))


# ---- NF4


@pytest.mark.parametrize("double_quantization", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "cols", "count"),
    [
        (1, 1, 1),
        (3, 7, 4),
        (40, 41, ALL),
        (64, 65, 0),
        (130, 127, 3000),  # more than one block of 256 scales, several tiles, the last one short
        pytest.param(4096, 4096, 386000, marks=GPU),
        pytest.param(4096, 11008, 45088, marks=GPU),
    ],
)
def test_nf4_with_deltas(dtype: torch.dtype, rows: int, cols: int, count: int, double_quantization: bool) -> None:
    weight = normal(rows, cols, dtype=dtype, seed=6) / 20
    stored = quantize_nf4(weight, double_quantization=double_quantization)
    tensors, shape = (stored.packed, stored.absmax, stored.nested_statistics), (rows, cols)
    indices = drawn(rows * cols, count)
    values = normal(indices.numel(), seed=7) / 100
    expected = plainly_merged(dequantize_nf4(*tensors, shape=shape, dtype=dtype), indices, values)
    result = triton_kernels.dequantize_with_deltas(*tensors, indices, values, shape=shape, dtype=dtype)
    assert result.dtype == dtype and torch.equal(result, expected)
    begins = triton_kernels.tile_begins(indices, rows * cols)
    again = triton_kernels.dequantize_with_deltas(
        *tensors, indices.long(), values, shape=shape, dtype=dtype, begins=begins
    )
    assert torch.equal(again, expected)


@pytest.mark.parametrize("double_quantization", [False, True])
def test_nf4_with_strips_in_any_order(double_quantization: bool) -> None:
    weight = normal(12, 48, dtype=torch.bfloat16, seed=6) / 20
    stored = quantize_nf4(weight, double_quantization=double_quantization)
    tensors, shape = (stored.packed, stored.absmax, stored.nested_statistics), (12, 48)
    strips, values = drawn(36, 9).flip(0), normal(9, 16, seed=7) / 100
    positions = strips[:, None] * 16 + torch.arange(16, device=DEVICE)
    expected = plainly_merged(
        dequantize_nf4(*tensors, shape=shape, dtype=torch.bfloat16), positions.view(-1), values.view(-1)
    )
    result = triton_kernels.dequantize_with_deltas(*tensors, strips, values, shape=shape, dtype=torch.bfloat16)
    assert torch.equal(result, expected)


# ---- a layer that uses them


@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_a_sparse_layer(base: str) -> None:
    """Forward and backward against autograd in fp64 through the merged dense weight."""
    rows, cols, tokens = 48, 64, 32
    weight, indices = normal(rows, cols, dtype=torch.bfloat16, seed=8) / 8, drawn(rows * cols, 90)
    values = normal(90, seed=9) / 10
    tensors = {"weight": weight.clone()}
    if base == "nf4":
        stored = quantize_nf4(weight, double_quantization=False)
        tensors = {"packed": stored.packed, "absmax": stored.absmax}
        weight = dequantize_nf4(stored.packed, stored.absmax, None, shape=(rows, cols), dtype=torch.bfloat16)
    parameters = {name: Parameter(x, requires_grad=False) for name, x in tensors.items()}
    parameters |= {"indices": Parameter(indices, requires_grad=False), "values": Parameter(values.clone())}
    layer = SparseLinear(SparseLayout(rows, cols, 90), torch.bfloat16, parameters)
    input = normal(tokens, cols, dtype=torch.bfloat16, seed=10).requires_grad_()
    grad_output = normal(tokens, rows, dtype=torch.bfloat16, seed=11)
    output = layer(input)
    output.backward(grad_output)

    merged = plainly_merged(weight, indices, values).double().requires_grad_()
    expected_input = input.detach().double().requires_grad_()
    expected = expected_input @ merged.t()
    expected.backward(grad_output.double())
    assert merged.grad is not None and layer.values.grad is not None
    torch.testing.assert_close(output.double(), expected, rtol=2**-7, atol=2**-7)  # rounded to bf16 once
    torch.testing.assert_close(input.grad.double(), expected_input.grad, rtol=2**-7, atol=2**-7)
    values_grad = merged.grad.view(-1)[indices.long()]
    torch.testing.assert_close(layer.values.grad.double(), values_grad, rtol=2**-7, atol=2**-7)
    if layer.weight is not None:
        assert torch.equal(layer.weight, weight)
