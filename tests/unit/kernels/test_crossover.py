"""Which path is taken follows from what a run was told and from the tensors, from nothing else."""

from __future__ import annotations

import pytest
import torch

from sparse_ds.kernels.crossover import AUTO, BLOCK_DEFAULTS, DEFAULTS, PathChoice, device_kind
from sparse_ds.kernels.product_operands import ProductOperands


def operands(num_rows: int = 20, num_cols: int = 50, dtype: torch.dtype = torch.bfloat16) -> ProductOperands:
    return ProductOperands(torch.zeros(2, num_rows, dtype=dtype), torch.zeros(2, num_cols, dtype=dtype))


@pytest.mark.parametrize("num_values", [0, 1, 500, 1000])
def test_a_path_that_was_named_is_taken(num_values: int) -> None:
    assert PathChoice("sampled").is_sampled(operands(), num_values)
    assert not PathChoice("dense").is_sampled(operands(), num_values)


def test_a_crossover_of_the_shape_goes_before_the_common_one() -> None:
    choice = PathChoice(crossover=0.1, crossover_of={(20, 50): 0.3})
    assert choice.is_sampled(operands(), 300) and not choice.is_sampled(operands(), 301)
    assert choice.is_sampled(operands(50, 20), 100) and not choice.is_sampled(operands(50, 20), 101)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_default_depends_on_device_and_dtype(dtype: torch.dtype) -> None:
    limit = int(DEFAULTS[device_kind("cpu"), dtype.itemsize] * 1000)
    assert AUTO.is_sampled(operands(dtype=dtype), limit) and not AUTO.is_sampled(operands(dtype=dtype), limit + 1)


def test_there_is_a_default_for_every_kind() -> None:
    assert {kind for kind, _ in DEFAULTS} == {"cpu", "cpu with AMX", "cuda"}
    for defaults in (DEFAULTS, BLOCK_DEFAULTS):
        assert len(defaults) == 6 and all(0 < density < 1 for density in defaults.values())
