"""The candidates are the positions of largest mean gradient, whatever each rank's share of the tokens is."""

from __future__ import annotations

import torch
from exact_run import make_layer
from ranks import run_ranks
from torch import Tensor

from sparse_ds.distributed.born_partitioned import PartitionedParameters
from sparse_ds.distributed.gradient_tiles import gather_slices
from sparse_ds.distributed.process_group import rank
from sparse_ds.drop_grow.candidate_search import TileSearch
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
    layer = make_layer(PartitionedParameters(), SparseLayout(NUM_ROWS, NUM_COLS, NUM_CANDIDATES), "layer")
    found = TileSearch(layer, TILE_BYTES).find(ProductOperands(*batch_of(rank())))
    return [gather_slices(layer.values, part).tolist() for part in (found.indices, found.gradient)]


def test_ranks_with_different_numbers_of_tokens() -> None:
    for num_ranks in (1, 2, 3):
        batches = [batch_of(number) for number in range(num_ranks)]
        mean = sum((grad.T @ x for grad, x in batches), torch.zeros(NUM_ROWS, NUM_COLS)).view(-1) / num_ranks
        # Ties go to the smaller index: a stable sort.
        expected = mean.abs().sort(descending=True, stable=True).indices[:NUM_CANDIDATES].sort().values
        for indices, gradient in run_ranks(num_ranks, find):
            assert indices == expected.tolist()
            assert gradient == mean[expected].tolist()
