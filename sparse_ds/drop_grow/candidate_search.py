"""The blocks (of one weight by default) of largest dense gradient of one matrix, found by all ranks together.

    for each tile of rows:
        dense       this rank's gradient of the rows                     rows x cols, transient
        reduce      mean over ranks, one part per rank                   reduce-scatter
        keep        of its parts each rank keeps the K largest           at most K entries

and of many matrices together:

    threshold       the K-th largest of what all ranks kept              6 all-reduces of 16 KiB a matrix (radix search)
    place           the chosen ones in ascending order, sliced over      an all-gather of 8 bytes a tile, and a
                    the ranks like the layers' values                    reduce-scatter of 8 bytes a candidate

A block is scored by the sum of |gradient| over its weights, and stays whole in every part: below, positions and entries
are those of blocks, K is their number.

What is chosen does not depend on the number of ranks, nor on the tiles. Of the dense gradient no more than one tile is
ever there: `search_tiles` looks at each part and forgets it. `DenseAccumulator` instead adds the parts up over several
micro batches, which takes 4 * N / R bytes per rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_ds.distributed.gradient_tiles import (
    counts_of_ranks,
    part_of_tile,
    place_slices,
    reduce_tile,
    sum_over_ranks,
)
from sparse_ds.distributed.process_group import rank, world_size
from sparse_ds.distributed.zero3_partitions import all_reduce_max_
from sparse_ds.kernels.dense_row_blocks import gradient_block
from sparse_ds.kernels.product_operands import ProductOperands
from sparse_ds.selection.largest_keys import LargestKeys, first_places, index_of, kth_smallest_keys
from sparse_ds.sparse.layout import SparseLayout
from sparse_ds.sparse.sparse_linear import SparseLinear

TILE_BYTES_PER_ELEMENT = 32
"""Transient bytes per element of a tile at the most, with one rank: the product in 16 bits and in fp32 (6), padded for
the reduction (4) and its part (4), and the search in it (14, `LargestKeys`), rounded up."""


@dataclass(frozen=True)
class Candidates:
    """This rank's slice of the candidates of one matrix, sliced like the layer's values."""

    indices: Tensor
    """[n] dtype of the layer's indices, ascending over all ranks."""
    gradient: Tensor
    """[n * e] fp32, the reduced gradient by which they were found."""


@dataclass(frozen=True)
class Tiling:
    """How one matrix is cut into tiles of whole rows."""

    layout: SparseLayout
    rows_per_tile: int

    @classmethod
    def within(cls, layout: SparseLayout, tile_bytes: int, bytes_per_row: int = 0) -> Tiling:
        """Tiles whose transient memory stays within `tile_bytes` (one row of blocks at least).

        Args:
            layout: of the matrix.
            tile_bytes: the bound.
            bytes_per_row: what a row of a tile costs besides (its copy of the output's gradient).
        """
        rows = tile_bytes // (TILE_BYTES_PER_ELEMENT * layout.num_cols + bytes_per_row)
        rows = min(rows, layout.num_rows) // layout.block_rows * layout.block_rows
        return cls(layout, max(layout.block_rows, rows))

    @property
    def num_tiles(self) -> int:
        return math.ceil(self.layout.num_rows / self.rows_per_tile)

    def parts(self) -> Iterator[tuple[int, int]]:
        """(first index, number of indices) of this rank's part of each tile."""
        grid, rows_per_tile = self.layout.grid, self.rows_per_tile // self.layout.block_rows
        for tile in range(self.num_tiles):
            first_row = tile * rows_per_tile
            num_rows = min(rows_per_tile, grid.num_rows - first_row)
            begin, end = part_of_tile(num_rows * grid.num_cols)
            yield first_row * grid.num_cols + begin, end - begin


def reduced_parts(tiling: Tiling, operands: ProductOperands, *, squared: bool = False) -> Iterator[tuple[int, Tensor]]:
    """(first index, fp32 part of this rank) of the dense gradient, reduced over ranks, tile by tile; a part is block
    after block, row-major inside.

    What is not finite counts as 0: the engine skips such a step on all ranks, and until then no rank may fail alone.

    Args:
        tiling: of the matrix.
        operands: of this rank's dense gradient.
        squared: square each rank's gradient before the reduction (as the sum over R of its share of the mean).

    Collectives: one reduce-scatter per tile; every rank must read all of them.
    """
    layout = tiling.layout
    for tile, (first, length) in enumerate(tiling.parts()):
        first_row = tile * tiling.rows_per_tile
        dense_BI = gradient_block(operands, first_row, tiling.rows_per_tile)
        if squared:
            dense_BI = dense_BI.float().div_(world_size()).square_()
        part = reduce_tile(layout.block_after_block(dense_BI), layout.block_elements)
        del dense_BI
        assert part.numel() == length * layout.block_elements
        yield first, part.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        del part


@dataclass(frozen=True)
class Search:
    """What this rank has kept of one matrix: at most K entries of 12 bytes, of blocks their gradients besides."""

    layer: SparseLinear
    tiling: Tiling
    largest: LargestKeys

    @property
    def max_bytes(self) -> int:
        """At the most; the same on every rank."""
        layout = self.layer.layout
        return 12 * layout.grid.num_slots + (4 * layout.num_slots if layout.block_elements > 1 else 0)


def common_row_bytes(operands: ProductOperands) -> int:
    """Bytes of one row of the output's gradient, transposed: ranks may see different numbers of tokens, but their tiles
    must be the same. Collectives: one all-reduce of a number."""
    row_bytes = torch.tensor([operands.num_tokens * operands.grad_output_TO.element_size()])
    all_reduce_max_(row_bytes, operands.input_TI.device)
    return int(row_bytes)


def search_tiles(layer: SparseLinear, tiling: Tiling, operands: ProductOperands) -> Search:
    """Look at the dense gradient of one micro batch; it is never kept.

    Memory: 12 bytes per candidate (at most 12 * K per rank) and the tile.
    Collectives: those of `reduced_parts`.
    """
    largest = LargestKeys(layer.layout.grid.num_slots, operands.input_TI.device)
    for first, part in reduced_parts(tiling, operands):
        _look_at(part, first, tiling.layout, largest)
    return Search(layer, tiling, largest)


class DenseAccumulator:
    """This rank's parts of the dense gradient of one matrix, summed over micro batches.

    Memory: 4 * N / R bytes per rank, and the tile.

    Args:
        layer: the matrix.
        tile_bytes: bound on the transient memory of a tile.
        squared: sum the squares of the ranks' gradients.
        device: of the gradients.
    """

    def __init__(self, layer: SparseLinear, tile_bytes: int, *, squared: bool, device: torch.device) -> None:
        self._layer, self._squared = layer, squared
        self._tiling = Tiling.within(layer.layout, tile_bytes)
        num_owned = sum(length for _, length in self._tiling.parts()) * layer.layout.block_elements
        self.sums = torch.zeros(num_owned, device=device)
        """fp32, the parts of all tiles one after the other."""

    def add(self, operands: ProductOperands) -> None:
        """Collectives: those of `reduced_parts`."""
        position = 0
        for _, part in reduced_parts(self._tiling, operands, squared=self._squared):
            self.sums[position : position + part.numel()].add_(part)
            position += part.numel()

    def search(self) -> Search:
        """By the sums so far. Collectives: none."""
        layout = self._layer.layout
        largest = LargestKeys(layout.grid.num_slots, self.sums.device)
        position = 0
        for first, length in self._tiling.parts():
            end = position + length * layout.block_elements
            _look_at(self.sums[position:end], first, layout, largest)
            position = end
        return Search(self._layer, self._tiling, largest)


def _look_at(part: Tensor, first_index: int, layout: SparseLayout, largest: LargestKeys) -> None:
    """Let `largest` see the blocks whose gradient is `part`."""
    if layout.block_elements == 1:
        largest.add(part, first_index)
    else:
        largest.add(layout.block_sums(part.abs()), first_index, part.view(-1, layout.block_elements))


def choose(searches: Sequence[Search]) -> list[Candidates]:
    """Of each matrix the K largest of what all ranks kept, in ascending order, sliced over the ranks like its values.

    Memory: 16 bytes per candidate, transient.
    Collectives: for all matrices together 6 all-reduces of 16 KiB a matrix, one all-gather of 8 bytes per tile and one
    reduce-scatter of 8 bytes per candidate; every rank must call it with the same matrices.
    """
    if not searches:
        return []
    kept = [search.largest for search in searches]
    num_candidates = [search.layer.layout.grid.num_slots for search in searches]
    kth_keys = kth_smallest_keys([largest.keys for largest in kept], num_candidates, sum_over_ranks)
    entries, up_to = [], []
    for search, kth in zip(searches, kth_keys, strict=True):
        largest = search.largest
        chosen = largest.keys <= kth
        indices = index_of(largest.keys[chosen])
        gradient = largest.scores[chosen] if largest.details is None else largest.details[chosen]
        ends = torch.tensor([first + length for first, length in search.tiling.parts()], device=indices.device)
        up_to.append(torch.searchsorted(indices, ends))
        entries.append([indices.to(search.layer.layout.index_dtype), gradient])
    counts = [up_to_P.diff(prepend=up_to_P.new_zeros(1)) for up_to_P in up_to]
    counts_of_all = torch.split(counts_of_ranks(torch.cat(counts)), [counts_P.numel() for counts_P in counts], dim=1)
    places = []
    for up_to_P, counts_P, counts_RP in zip(up_to, counts, counts_of_all, strict=True):
        # Within a tile a rank's entries follow one another.
        begin_P = first_places(counts_RP)[rank()] - (up_to_P - counts_P)
        own = torch.arange(int(up_to_P[-1]), device=up_to_P.device)
        places.append(torch.repeat_interleave(begin_P, counts_P) + own)
    units = [search.layer.layout.block_elements for search in searches]
    slices = place_slices([search.layer.values for search in searches], places, entries, units)
    return [Candidates(indices, gradient.view(-1)) for indices, gradient in slices]
