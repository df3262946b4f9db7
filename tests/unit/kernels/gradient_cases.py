"""Random gradients and indices for the tests of the values' gradient."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sparse_ds.kernels.crossover import PathChoice
from sparse_ds.kernels.product_operands import ProductOperands
from sparse_ds.kernels.values_gradient import values_gradient
from sparse_ds.sparse.layout import SparseLayout

DENSE, SAMPLED = PathChoice("dense"), PathChoice("sampled")


def random_case(
    num_tokens: int, num_rows: int, num_cols: int, num_active: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(num_rows * num_cols, generator=generator)[:num_active].sort().values
    grad_output = torch.randn(num_tokens, num_rows, generator=generator)
    return grad_output, torch.randn(num_tokens, num_cols, generator=generator), indices.int()


def computed(
    grad_output: Tensor, input: Tensor, indices: Tensor, choice: PathChoice, scratch_elements: int | None = None
) -> Tensor:
    layout = SparseLayout(grad_output.shape[1], input.shape[1], indices.numel())
    row_boundaries = partial(layout.row_boundaries, indices)
    operands = ProductOperands(grad_output, input)
    return values_gradient(operands, indices, row_boundaries, choice=choice, scratch_elements=scratch_elements)
