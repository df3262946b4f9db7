"""Deltas held for a whole micro batch: the same bits as deltas put in for every product, and no trace afterwards."""

from __future__ import annotations

import pytest
import torch
from test_sparse_blocks import make_layer as make_layer_of_blocks
from test_sparse_linear import COLS, base_bytes, make_layer
from torch import Tensor
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from sparse_ds.sparse.held_deltas import deltas_held, layers_that_can_hold
from sparse_ds.sparse.index_storage import new_index_tensors
from sparse_ds.sparse.sparse_linear import SparseLinear

CPU = torch.device("cpu")


def layer_of(kind: str) -> SparseLinear:
    if kind == "blocks":
        return make_layer_of_blocks("bf16", (4, 4), 5, behind=2)[0]
    layer, _ = make_layer("fp32" if kind == "fp32" else "bf16", spare_slots=3, bias=True)
    return layer


def with_compact_indices(layer: SparseLinear) -> SparseLinear:
    assert layer.indices is not None
    tensors = new_index_tensors(layer.indices.data, layer.layout, layer.num_active, "compact")
    parameters = {name: Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    parameters |= {name: p for name, p in layer.named_parameters() if name != "indices"}
    return SparseLinear(layer.layout, layer.compute_dtype, parameters)


def outcome(layer: SparseLinear, checkpointing: bool) -> list[Tensor]:
    """Output and gradients; both, or None of them, are computed within the caller's context."""
    generator = torch.Generator().manual_seed(1)
    input = torch.randn(6, layer.in_features, generator=generator).to(layer.compute_dtype).requires_grad_()
    output = checkpoint(layer, input, use_reentrant=False) if checkpointing else layer(input)
    weights = torch.randn(output.shape, generator=generator).to(output.dtype)
    return [output, *torch.autograd.grad((output * weights).sum(), (input, layer.values))]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "blocks"])
def test_same_bits_and_no_trace(kind: str, checkpointing: bool) -> None:
    layer = layer_of(kind)
    before = base_bytes(layer)
    expected = outcome(layer, checkpointing)
    assert layers_that_can_hold([layer], CPU) == [layer]
    with deltas_held([layer]):
        assert not all(torch.equal(*pair) for pair in zip(base_bytes(layer), before, strict=True))
        result = outcome(layer, checkpointing)
        assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))
        # The optimizer may step before the end.
        with torch.no_grad():
            layer.values.add_(1)
    assert all(torch.equal(*pair) for pair in zip(base_bytes(layer), before, strict=True))
    assert layer.held_weight is None
    assert not torch.equal(outcome(layer, checkpointing)[0], expected[0]), "the values have changed"


def test_taken_out_on_errors() -> None:
    layers = [layer_of("bf16"), layer_of("fp32")]
    before = [base_bytes(layer) for layer in layers]
    with pytest.raises(KeyboardInterrupt), deltas_held(layers):
        raise KeyboardInterrupt
    for layer, bytes_before in zip(layers, before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(base_bytes(layer), bytes_before, strict=True))
        assert layer.held_weight is None


def test_a_copy_of_the_weight_is_refused() -> None:
    """Without the deltas in it, or with them twice, it would be another model."""
    layer = layer_of("bf16")
    assert layer.weight is not None
    with deltas_held([layer]):
        layer.weight.data = layer.weight.data.clone()
        with pytest.raises(RuntimeError, match="is not the one that holds the deltas"):
            layer(torch.ones(1, COLS, dtype=torch.bfloat16))


def test_only_a_whole_dense_weight_on_the_device_can_hold() -> None:
    assert layers_that_can_hold([make_layer("nf4")[0], torch.nn.Linear(2, 3)], CPU) == []
    assert layers_that_can_hold([with_compact_indices(layer_of("bf16"))], CPU) == []
    assert layers_that_can_hold([layer_of("bf16")], torch.device("cuda")) == []
