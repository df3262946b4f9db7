"""SparseLinear whose active unit is a block, against a dense linear layer with autograd, without ZeRO."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from sparse_ds.kernels.nf4 import dequantize_nf4, quantize_nf4
from sparse_ds.sparse.layout import SparseLayout
from sparse_ds.sparse.sparse_linear import SparseLinear

ROWS, COLS = 12, 16
BLOCKS = [(1, 4), (4, 4), (6, 1), (3, 8)]


def make_layer(
    base: str, block: tuple[int, int], num_blocks: int, behind: int = 0
) -> tuple[SparseLinear, Tensor, list[tuple[int, int]]]:
    """The layer, its dense base, and (row, column) of each value in the order of values. `behind` the active weights
    are blocks that must have no effect."""
    generator = torch.Generator().manual_seed(3)
    size, dtype = block[0] * block[1], torch.float32 if base == "fp32" else torch.bfloat16
    weight_OI = (torch.randn(ROWS, COLS, generator=generator) / 4).to(dtype)
    tensors: dict[str, Parameter] = {}
    if base == "nf4":
        stored = quantize_nf4(weight_OI, double_quantization=False)
        tensors["packed"] = Parameter(stored.packed, requires_grad=False)
        tensors["absmax"] = Parameter(stored.absmax, requires_grad=False)
        weight_OI = dequantize_nf4(stored.packed, stored.absmax, None, shape=(ROWS, COLS), dtype=dtype)
    else:
        tensors["weight"] = Parameter(weight_OI.clone(), requires_grad=False)
    grid_cols = COLS // block[1]
    indices = torch.randperm(ROWS * COLS // size, generator=generator)[:num_blocks].sort().values.int()
    tensors["indices"] = Parameter(F.pad(indices, (0, behind)), requires_grad=False)
    tensors["values"] = Parameter(torch.randn((num_blocks + behind) * size, generator=generator) / 4)
    layout = SparseLayout(
        ROWS, COLS, num_blocks * size, block_rows=block[0], block_cols=block[1], padding_slots=behind * size
    )
    places = [
        (index // grid_cols * block[0] + row, index % grid_cols * block[1] + col)
        for index in indices.tolist()
        for row in range(block[0])
        for col in range(block[1])
    ]
    return SparseLinear(layout, dtype, tensors), weight_OI, places


@pytest.mark.parametrize("behind", [0, 2])
@pytest.mark.parametrize("share", ["one", "some", "all"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4"])
def test_blocks_equal_the_dense_oracle(base: str, block: tuple[int, int], share: str, behind: int) -> None:
    total = ROWS * COLS // (block[0] * block[1])
    num_blocks = {"one": 1, "some": total // 3, "all": total}[share]
    layer, weight_OI, places = make_layer(base, block, num_blocks, behind)
    before = [p.data.view(torch.uint8).clone() for name, p in layer.named_parameters() if name != "values"]
    input = torch.randn(2, 5, COLS, generator=torch.Generator().manual_seed(4)).to(weight_OI.dtype).requires_grad_()
    deltas_OI = torch.zeros(ROWS, COLS)
    for place, value in zip(places, layer.values.tolist(), strict=False):
        deltas_OI[place] = value
    deltas_OI.requires_grad_()
    oracle_input = input.detach().clone().requires_grad_()
    expected = F.linear(oracle_input, (weight_OI.float() + deltas_OI).to(weight_OI.dtype))
    output = layer(input)
    assert torch.equal(output, expected), "the same product of the same rounded weight"
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    assert input.grad is not None and oracle_input.grad is not None
    assert layer.values.grad is not None and deltas_OI.grad is not None
    # As in the test of single weights: fp32 the order of sums, bf16 one rounding of fp32 sums on both sides.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if base == "fp32" else {"rtol": 2**-7, "atol": 1e-2}
    torch.testing.assert_close(input.grad, oracle_input.grad, **tolerance)
    wanted = torch.stack([deltas_OI.grad[place] for place in places])
    torch.testing.assert_close(layer.values.grad[: len(places)], wanted, **tolerance)
    assert not layer.values.grad[len(places) :].any()
    after = [p.data.view(torch.uint8) for name, p in layer.named_parameters() if name != "values"]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_hidden_deltas_of_blocks_are_counted() -> None:
    layer, _, places = make_layer("bf16", (4, 4), 3)
    layer.values.data.mul_(0).add_(1e-7)
    layer.values.data[:5] = 1.0
    layer.values.data[7] = 0.0
    layer.count_hidden = True
    layer(torch.randn(1, COLS).bfloat16())
    assert layer.hidden_deltas == (len(places) - 6, len(places) - 1)
