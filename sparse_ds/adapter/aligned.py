"""The deltas that several adapters have for one matrix, put side by side on the union of their indices.

    adapter 0   indices 2 5 9      values  a b c                 union   2 3 5 9
    adapter 1   indices 3 5        values  d e        becomes    values  a 0 b c
                                                                         0 d e 0

The union is walked in chunks, so the table never has more than A x chunk entries: memory is that of the deltas
themselves, of their union, and of one chunk. Every formula that works entry by entry can be applied chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_ds.adapter.adapter import Deltas

CHUNK = 1 << 20
"""Entries of the union in memory at a time: 9 MiB an adapter."""


class AlignedChunk(NamedTuple):
    """A run of the union, U entries of it, of A adapters."""

    indices: Tensor
    """[U] ascending, of the deltas' own dtype."""
    values: Tensor
    """[A, U] fp64; 0 where an adapter does not have the index."""
    present: Tensor
    """[A, U] bool: the adapter has the index (its value may be 0)."""


def union_of(indices: Sequence[Tensor]) -> Tensor:
    """[U] ascending: every index that is in at least one of the given ones, which have one dtype and a matrix of one
    shape in common."""
    union: Tensor = torch.unique_consecutive(torch.cat(list(indices)).sort().values)
    return union


def aligned_chunks(deltas: Sequence[Deltas], *, chunk: int = CHUNK) -> Iterator[AlignedChunk]:
    """The table above, `chunk` columns at a time, in ascending order.

    Args:
        deltas: of one matrix, from A >= 1 adapters: indices ascending and unique, on the CPU.
        chunk: columns at a time; does not change what comes.
    """
    union = union_of([indices for indices, _ in deltas])
    for begin in range(0, union.numel(), chunk):
        indices_U = union[begin : begin + chunk]
        values_AU = torch.zeros(len(deltas), indices_U.numel(), dtype=torch.float64)
        present_AU = torch.zeros_like(values_AU, dtype=torch.bool)
        for number, (own_indices_K, own_values_K) in enumerate(deltas):
            first = int(torch.searchsorted(own_indices_K, indices_U[:1]))
            end = int(torch.searchsorted(own_indices_K, indices_U[-1:], right=True))
            places = torch.searchsorted(indices_U, own_indices_K[first:end])
            values_AU[number, places] = own_values_K[first:end].double()
            present_AU[number, places] = True
        yield AlignedChunk(indices_U, values_AU, present_AU)
