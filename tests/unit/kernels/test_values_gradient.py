"""The gradient of the values, on both paths, against the whole dense gradient in fp64."""

from __future__ import annotations

import shutil

import pytest
import torch
from gradient_cases import DENSE, SAMPLED, computed, random_case
from hypothesis import given
from hypothesis import strategies as st

from sparse_ds.kernels import sampled_product
from sparse_ds.kernels.crossover import AUTO, PathChoice
from sparse_ds.kernels.product_operands import ProductOperands
from sparse_ds.kernels.values_gradient import reference_values_gradient

PATHS = [DENSE, SAMPLED, AUTO]
both_paths = pytest.mark.parametrize("choice", [DENSE, SAMPLED], ids=["dense", "sampled"])


@given(
    num_tokens=st.integers(1, 9),
    num_rows=st.integers(1, 23),
    num_cols=st.integers(1, 19),
    share=st.sampled_from(["none", "one", "some", "all"]),
    scratch_elements=st.sampled_from([None, 1, 7, 40, 10_000]),
    choice=st.sampled_from(PATHS),
    seed=st.integers(0, 99),
)
def test_equals_the_fp64_reference(
    num_tokens: int,
    num_rows: int,
    num_cols: int,
    share: str,
    scratch_elements: int | None,
    choice: PathChoice,
    seed: int,
) -> None:
    num_elements = num_rows * num_cols
    num_active = {"none": 0, "one": 1, "some": -(-num_elements // 3), "all": num_elements}[share]
    grad_output, input, indices = random_case(num_tokens, num_rows, num_cols, num_active, seed)
    result = computed(grad_output, input, indices, choice, scratch_elements)
    assert result.shape == (num_active,) and result.dtype == torch.float32
    # fp32 sums of at most 9 products of numbers below about 5.
    expected = reference_values_gradient(grad_output, input, indices)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scratch_elements", [1, 50, 10**6])
@pytest.mark.parametrize("num_tokens", [33, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both_paths
def test_16_bits_round_each_sum_once(
    choice: PathChoice, dtype: torch.dtype, num_tokens: int, scratch_elements: int
) -> None:
    grad_output, input, indices = random_case(num_tokens, 17, 21, 120)
    grad_output, input = grad_output.to(dtype), input.to(dtype)
    result = computed(grad_output, input, indices, choice, scratch_elements).double()
    expected = reference_values_gradient(grad_output, input, indices)
    # The products accumulate in fp32: rounding the sum costs at most half a unit in its last place (2^-9 or 2^-12 of
    # it), and the accumulation of 1000 products of numbers below 5 far less.
    torch.testing.assert_close(result, expected, rtol=torch.finfo(dtype).eps * 0.51, atol=2e-4)
    assert not torch.equal(result, expected)


@both_paths
def test_large_sums_of_small_terms_are_not_lost(choice: PathChoice) -> None:
    """4096 terms of 1: a bf16 accumulator would stop at 256."""
    ones = torch.ones(4096, 8, dtype=torch.bfloat16)
    result = computed(ones, ones, torch.arange(0, 64, 5, dtype=torch.int32), choice)
    assert result.tolist() == [4096.0] * 13


@both_paths
def test_long_indices_and_int32_indices_give_the_same(choice: PathChoice) -> None:
    grad_output, input, indices = random_case(4, 6, 5, 11)
    assert torch.equal(
        computed(grad_output, input, indices, choice, 10), computed(grad_output, input, indices.long(), choice, 10)
    )


@both_paths
def test_rows_without_indices_are_not_looked_at(choice: PathChoice) -> None:
    """Rows 4 to 7 have none: with NaN there, the result is still finite."""
    grad_output, input, _ = random_case(3, 8, 5, 0)
    grad_output[:, 4:] = torch.nan
    indices = torch.tensor([0, 7, 19], dtype=torch.int32)
    assert bool(computed(grad_output, input, indices, choice, scratch_elements=20).isfinite().all())


@both_paths
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strided_operands_are_read_as_they_are(choice: PathChoice, dtype: torch.dtype) -> None:
    """As autograd may hand them over: a broadcast gradient, and an input that is a part of a larger tensor."""
    _, wide, indices = random_case(6, 7, 10, 20)
    indices = indices[indices < 7 * 5]
    grad_output, input = torch.full((), 0.5, dtype=dtype).expand(6, 7), wide.to(dtype)[:, ::2]
    result = computed(grad_output, input, indices, choice)
    assert torch.equal(result, computed(grad_output.contiguous(), input.contiguous(), indices, choice))


@both_paths
def test_is_deterministic(choice: PathChoice) -> None:
    case = random_case(300, 96, 80, 700)
    first = computed(*case, choice, 2000)
    assert all(torch.equal(first, computed(*case, choice, 2000)) for _ in range(3))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_compiled_sampled_path_sums_in_fp32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that vectors do not divide, sides, K and T equal and not: one compiled function for all of them. (K = 0 and
    K = 1 never get there.)"""
    monkeypatch.setattr(sampled_product, "MIN_COMPILED_PRODUCTS", 1)
    for num_tokens, num_rows, num_cols, num_active in [
        (64, 64, 64, 64),
        (33, 20, 33, 7),
        (1000, 17, 21, 357),
    ]:
        grad_output, input, indices = random_case(num_tokens, num_rows, num_cols, num_active)
        grad_output, input = grad_output.to(dtype), input.to(dtype)
        expected = reference_values_gradient(grad_output, input, indices)
        for positions in (indices, indices.long()):
            result = computed(grad_output, input, positions, SAMPLED)
            # fp32 sums of up to 1000 products of numbers below 5; a sum rounded to 16 bits would be off by up to 0.1.
            torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-4)
            assert torch.equal(result, computed(grad_output, input, positions, SAMPLED)), "not deterministic"
    assert not sampled_product._compiled.failed and sampled_product._compiled._compiled is not None


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_the_compiled_sampled_path_holds_no_products() -> None:
    """2048 tokens and 20,000 values: the products would be 164 MB, the transposes are 3 MB."""
    grad_output, input, indices = random_case(2048, 300, 400, 20_000)
    operands = ProductOperands(grad_output.bfloat16(), input.bfloat16())
    sampled_product.sampled_values_gradient(operands, indices)
    with torch.profiler.profile(profile_memory=True) as profiler:
        sampled_product.sampled_values_gradient(operands, indices)
    assert not sampled_product._compiled.failed
    allocated = [event.cpu_memory_usage for event in profiler.key_averages()]
    assert 0 < max(allocated) < 4 * 2**20
