"""Both kinds of activation checkpointing around sparse layers under ZeRO-3: the same losses, and the base untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from partition_probe import hash_base
from ranks import run_ranks
from toy_engine import start_toy

from sparse_ds.distributed.zero3_partitions import local_partition


def train_toy(use_reentrant: bool | None) -> dict[str, Any]:
    toy = start_toy(use_reentrant=use_reentrant)
    base = hash_base(toy.model)
    # The reentrant kind computes gradients only for inputs that need one.
    x = torch.randn(6, 11, generator=torch.Generator().manual_seed(5)).requires_grad_()
    losses = [toy.train_step(x) for _ in range(2)]
    assert hash_base(toy.model) == base, "the base was changed"
    assert all(parameter.data.numel() == 0 for parameter in toy.model.parameters()), "something stays gathered"
    values = [local_partition(layer.values).tolist() for layer in toy.layers.values()]
    assert any(value for values_of_layer in values for value in values_of_layer)
    return {"losses": losses, "values": values}


def train_three_times() -> list[dict[str, Any]]:
    return [train_toy(use_reentrant) for use_reentrant in (None, True, False)]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_checkpointed_layers_train_bit_for_bit_the_same(num_ranks: int) -> None:
    for without, reentrant, non_reentrant in run_ranks(num_ranks, train_three_times):
        assert reentrant == without
        assert non_reentrant == without
