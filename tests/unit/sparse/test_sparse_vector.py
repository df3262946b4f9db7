"""Sparsely trained biases and norms against dense torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sparse_ds.sparse.layout import SparseLayout
from sparse_ds.sparse.sparse_linear import SparseLinear
from sparse_ds.sparse.sparse_vector import SparseLayerNorm, SparseRMSNorm, SparseVector

INDICES = [0, 3, 4, 8]


def vector_tensors(dtype: torch.dtype, values: Tensor | None = None) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, generator=generator).to(dtype)
    values = torch.randn(4, generator=generator) / 10 if values is None else values
    return {
        "weight": Parameter(weight, requires_grad=False),
        "indices": Parameter(torch.tensor(INDICES, dtype=torch.int32), requires_grad=False),
        "values": Parameter(values),
    }


def dense(tensors: dict[str, Parameter]) -> Tensor:
    weight = tensors["weight"].detach().clone()
    for index, value in zip(INDICES, tensors["values"].detach(), strict=True):
        weight[index] = (weight[index].float() + value).to(weight.dtype)
    return weight


def llama_norm(layout: SparseLayout, tensors: dict[str, Parameter]) -> tuple[nn.Module, nn.Module]:
    return SparseRMSNorm(layout, tensors, eps=1e-5), LlamaRMSNorm(9, eps=1e-5)


def gemma2_norm(layout: SparseLayout, tensors: dict[str, Parameter]) -> tuple[nn.Module, nn.Module]:
    return SparseRMSNorm(layout, tensors, eps=1e-5, adds_one=True), Gemma2RMSNorm(9, eps=1e-5)


def layer_norm(layout: SparseLayout, tensors: dict[str, Parameter]) -> tuple[nn.Module, nn.Module]:
    bias = torch.randn(9, generator=torch.Generator().manual_seed(3)).to(tensors["weight"].dtype)
    expected = nn.LayerNorm(9, eps=1e-5)
    expected.bias = Parameter(bias, requires_grad=False)
    return SparseLayerNorm(layout, tensors, Parameter(bias, requires_grad=False), 1e-5), expected


@pytest.mark.parametrize("make", [llama_norm, gemma2_norm, layer_norm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype: torch.dtype, make: Callable[..., tuple[nn.Module, nn.Module]]) -> None:
    tensors = vector_tensors(dtype)
    norm, expected = make(SparseLayout(9, 1, 4), tensors)
    expected.weight = Parameter(dense(tensors))
    before = tensors["weight"].detach().clone()
    x = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    output, expected_output = norm(x), expected(y)
    assert torch.equal(output, expected_output)
    output.float().square().sum().backward()
    expected_output.float().square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert tensors["values"].grad.dtype == torch.float32
    assert torch.equal(tensors["values"].grad, expected.weight.grad[INDICES].float())
    assert torch.equal(tensors["weight"], before) and tensors["weight"].grad is None


def test_bias_of_a_linear_layer() -> None:
    generator = torch.Generator().manual_seed(2)
    layout = SparseLayout(9, 6, 5)
    matrix = {
        "weight": Parameter(torch.randn(9, 6, generator=generator), requires_grad=False),
        "indices": Parameter(torch.tensor([1, 7, 20, 33, 53], dtype=torch.int32), requires_grad=False),
        "values": Parameter(torch.randn(5, generator=generator)),
    }
    tensors = vector_tensors(torch.float32)
    layer = SparseLinear(layout, torch.float32, matrix, SparseVector(SparseLayout(9, 1, 4), tensors))
    assert {name for name, _ in layer.named_parameters() if name.startswith("bias")} == {
        "bias.weight",
        "bias.indices",
        "bias.values",
    }
    x = torch.randn(7, 6, generator=generator)
    bias = dense(tensors).requires_grad_()
    weight = matrix["weight"].clone()
    weight.view(-1)[matrix["indices"].long()] += matrix["values"].detach()
    expected = torch.nn.functional.linear(x, weight, bias)
    output = layer(x)
    assert torch.allclose(output, expected, rtol=1e-5, atol=1e-6)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(tensors["values"].grad, bias.grad[INDICES], rtol=1e-5, atol=1e-5)


def test_hidden_deltas_are_counted() -> None:
    """1e-7 is lost beside a bf16 weight of ordinary size; 0 is no delta."""
    tensors = vector_tensors(torch.bfloat16, torch.tensor([1e-7, 0.5, 0.0, 1e-7]))
    vector = SparseVector(SparseLayout(9, 1, 4), tensors)
    vector.count_hidden = True
    vector()
    assert vector.hidden_deltas == (2, 3)
