"""Both paths of the values' gradient on a GPU, against fp64."""

from __future__ import annotations

import pytest
import torch

from sparse_ds.kernels.crossover import PathChoice
from sparse_ds.kernels.product_operands import ProductOperands
from sparse_ds.kernels.values_gradient import reference_values_gradient, values_gradient


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("path", ["sampled", "dense"])
def test_the_gradient_on_a_gpu(path: str, dtype: torch.dtype) -> None:
    """Blocks of rows smaller than the matrix, the last one ragged."""
    generator = torch.Generator().manual_seed(0)
    grad_output, input = torch.randn(200, 130, generator=generator), torch.randn(200, 96, generator=generator)
    grad_output, input = grad_output.to("cuda", dtype), input.to("cuda", dtype)
    indices = torch.randperm(130 * 96, generator=generator)[:700].sort().values.int().cuda()

    def boundaries(num_rows: int) -> list[int]:
        firsts = torch.arange(0, 130 + num_rows, num_rows, device="cuda").clamp(max=130) * 96
        found: list[int] = torch.searchsorted(indices.long(), firsts).tolist()
        return found

    operands = ProductOperands(grad_output, input)
    result = values_gradient(operands, indices, boundaries, choice=PathChoice(path), scratch_elements=96 * 37)  # type: ignore[arg-type]
    expected = reference_values_gradient(grad_output, input, indices)
    # fp32 sums of 200 products; fp32 inputs may be multiplied in TF32 by neither path.
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-3)
