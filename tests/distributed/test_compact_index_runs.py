"""Runs whose indices are stored compactly, on 1 and 2 ranks, are those with plain ones: not a bit differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from communication_run import NUM_TOKENS, VOCABULARY, Case, start
from exact_run import ExactRun, run_config
from ranks import run_ranks
from torch import nn

from sparse_ds.distributed.process_group import rank, world_size
from sparse_ds.distributed.zero3_partitions import local_partition, owned_range
from sparse_ds.sparse.index_storage import are_compact, index_parameters, own_indices
from sparse_ds.sparse.sparse_linear import SparseLinear

STEPS = 10
EVENTS = {"interval_steps": 3, "estimation_steps": 2, "initial_drop_fraction": 0.5}
"""Events after steps 2, 5 and 8."""
METHODS: dict[str, dict[str, Any]] = {
    "sft_ag": {"name": "sft_ag", **EVENTS},
    "sft_ag, redistribution": {"name": "sft_ag", **EVENTS, "redistribution_factor": 1.75},
    "fisher": {"name": "fisher", "estimation_steps": 3},
}
LLAMAS = [("none", True), ("nf4", False)]
"""(quantization, activation checkpointing)."""


def train_exact(method: dict[str, Any], storage: str) -> dict[str, Any]:
    config = run_config(
        {**method, "index_storage": storage}, num_ranks=world_size(), accumulation=2, steps=STEPS, density=0.11
    )
    run = ExactRun(config)
    run.train()
    for layer in run.layers.values():
        check_storage(layer, storage)
    return {**run.outcome(), "losses": run.losses}


def check_storage(layer: SparseLinear, storage: str) -> None:
    """What every rank holds, and that its own slice is the right part of the whole."""
    assert are_compact(layer) == (storage == "compact")
    for parameter in index_parameters(layer).values():
        assert local_partition(parameter).dtype == (torch.uint8 if storage == "compact" else torch.int32)
    start_of_slice, num_real = owned_range(layer.values)
    own = own_indices(layer)
    num_active = max(0, min(num_real, layer.num_active - start_of_slice))
    assert own.shape == (num_real,) and own.dtype == torch.int32
    assert not own[num_active:].any()
    assert bool((own[1:num_active] > own[: max(0, num_active - 1)]).all())


def train_llama(quantization: str, gradient_checkpointing: bool, storage: str) -> dict[str, Any]:
    """SpaRTA on a bf16 Llama, blocks gathered as one."""
    case = Case(quantization, gradient_checkpointing, index_storage=storage)  # type: ignore[arg-type]
    started = start(case)
    engine, layers = started.engine, started.layers
    draw_base(started.model)
    generator = torch.Generator().manual_seed(rank())
    losses = []
    for _ in range(4):
        ids = torch.randint(VOCABULARY, (1, NUM_TOKENS), generator=generator)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    values = {name: local_partition(layer.values).tolist() for name, layer in layers.items()}
    return {
        "losses": losses,
        "values": values,
        "indices": {name: own_indices(layer).tolist() for name, layer in layers.items()},
    }


def draw_base(model: nn.Module) -> None:
    """Random numbers in place of zeros; the same whatever holds the indices."""
    generator = torch.Generator().manual_seed(7 + rank())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or ".index" in name or ".indices" in name:
            continue
        partition = local_partition(parameter)
        if partition.dtype == torch.uint8:
            partition.random_(0, 256, generator=generator)
        else:
            partition.uniform_(0.01, 0.2, generator=generator)
            if name.endswith("weight"):
                partition.sub_(0.1)


def train_all() -> dict[str, list[dict[str, Any]]]:
    found = {
        name: [train_exact(method, storage) for storage in ("int32", "compact")] for name, method in METHODS.items()
    }
    for case in LLAMAS:
        found[str(case)] = [train_llama(*case, storage) for storage in ("int32", "compact")]
    return found


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_runs_are_the_same(num_ranks: int) -> None:
    for outcomes in run_ranks(num_ranks, train_all):
        for name, (plain, compact) in outcomes.items():
            assert plain == compact, name
            assert len(set(plain["losses"])) > 1, name
        assert len(set(outcomes["sft_ag"][0]["hashes"])) == 3
        assert any(value for of_layer in outcomes[str(LLAMAS[0])][0]["values"].values() for value in of_layer)
