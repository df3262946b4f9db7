"""The candidates are the positions of largest mean gradient, whatever each rank's share of the tokens is; those of
several matrices are chosen together, and few collectives serve a whole phase."""

from __future__ import annotations

import sys
from typing import Any

import torch
from exact_run import SHAPES, ExactRun, make_layer, run_config
from ranks import run_ranks
from torch import Tensor

from sparse_ds.distributed.born_partitioned import PartitionedParameters
from sparse_ds.distributed.process_group import rank, world_size
from sparse_ds.distributed.zero3_partitions import gather_partitions
from sparse_ds.drop_grow import estimation
from sparse_ds.drop_grow.candidate_search import Tiling, choose, common_row_bytes, search_tiles
from sparse_ds.kernels.product_operands import ProductOperands
from sparse_ds.sparse.layout import SparseLayout

NUM_ROWS, NUM_COLS, NUM_CANDIDATES = 61, 24, 200
TOKENS_OF_RANK = (3, 200, 17)
TILE_BYTES = 4000
"""A tile of 5 rows for 3 tokens, and of 2 for 200."""


def batch_of(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    num_tokens = TOKENS_OF_RANK[number]
    # Integers: their sums are exact in every order.
    grad_output_TO = torch.randint(-9, 10, (num_tokens, NUM_ROWS), generator=generator).float()
    return grad_output_TO, torch.randint(-9, 10, (num_tokens, NUM_COLS), generator=generator).float()


def find() -> list[list[float]]:
    """Together with those of another matrix of other shape: both are searched in one go."""
    partitioned, (grad_output_TO, input_TI) = PartitionedParameters(), batch_of(rank())
    layer = make_layer(partitioned, SparseLayout(NUM_ROWS, NUM_COLS, NUM_CANDIDATES), "layer")
    other = make_layer(partitioned, SparseLayout(NUM_COLS, NUM_ROWS, 3), "other")
    searches = []
    for each, operands in (
        (layer, ProductOperands(grad_output_TO, input_TI)),
        (other, ProductOperands(input_TI, grad_output_TO)),
    ):
        tiling = Tiling.within(each.layout, TILE_BYTES, common_row_bytes(operands))
        searches.append(search_tiles(each, tiling, operands))
    found = [
        (each.values, part)
        for each, candidates in zip((layer, other), choose(searches), strict=True)
        for part in (candidates.indices, candidates.gradient)
    ]
    gathered = gather_partitions(*zip(*found, strict=True), torch.device("cpu"))
    return [whole.tolist() for whole in gathered]


def test_ranks_with_different_numbers_of_tokens() -> None:
    for num_ranks in (1, 2, 3):
        batches = [batch_of(number) for number in range(num_ranks)]
        mean_OI = sum((grad.T @ x for grad, x in batches), torch.zeros(NUM_ROWS, NUM_COLS)) / num_ranks
        for indices, gradient, other_indices, other_gradient in run_ranks(num_ranks, find):
            for mean, number, found in (
                (mean_OI.flatten(), NUM_CANDIDATES, (indices, gradient)),
                (mean_OI.T.flatten(), 3, (other_indices, other_gradient)),
            ):
                # Ties go to the smaller index: a stable sort.
                expected = mean.abs().sort(descending=True, stable=True).indices[:number].sort().values
                assert found == (expected.tolist(), mean[expected].tolist())


ACCUMULATION, NUM_LAYERS = 2, len(SHAPES)


def run_phase(kept_bytes: int) -> tuple[list[dict[str, int]], dict[str, Any]]:
    """(collectives of each step of a phase, those of DeepSpeed left out; outcome of the run)"""
    estimation.KEPT_BYTES = kept_bytes
    method = {"name": "sft_ag", "interval_steps": 20, "estimation_steps": 3}
    run = ExactRun(run_config(method, num_ranks=world_size(), accumulation=ACCUMULATION, steps=4, density=0.2))
    calls: list[dict[str, int]] = []
    names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
    genuine = {name: getattr(torch.distributed, name) for name in names}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if sys._getframe(1).f_globals["__name__"].startswith("sparse_ds."):
                calls[-1][name] = calls[-1].get(name, 0) + 1
            return genuine[name](*args, **kwargs)

        return call

    for name in names:
        setattr(torch.distributed, name, counting(name))
    try:
        for step in range(1, 4):
            calls.append({})
            run.train_step(step)
    finally:
        for name in names:
            setattr(torch.distributed, name, genuine[name])
    return calls, run.outcome()


def test_few_collectives_serve_all_matrices() -> None:
    """On two ranks; the third step ends with the event. One row of tiles: the matrices are small."""
    kept, outcome = run_ranks(2, run_phase, 2**28)[0]
    assert kept[0] == {"all_reduce": 1 + 6, "all_gather_into_tensor": 2, "reduce_scatter_tensor": NUM_LAYERS + 2}
    assert kept[1] == {"reduce_scatter_tensor": 1}
    assert kept[2] == {"reduce_scatter_tensor": 1, "all_gather_into_tensor": 1}
    # Without room to keep anything: one by one, in every micro batch. The numbers are integers: not a bit differs.
    one_by_one, same_outcome = run_ranks(2, run_phase, 1)[0]
    assert one_by_one[1] == dict.fromkeys(
        ("all_gather_into_tensor", "reduce_scatter_tensor"), ACCUMULATION * NUM_LAYERS
    )
    assert same_outcome == outcome and outcome["replaced"] != [0]
