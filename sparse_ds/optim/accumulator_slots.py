"""Where the row and column accumulators of each element of a flat tensor lie, for runs of elements across tensors.

A flat tensor is cut into *stretches*, the segments and the padding between them, and into chunks of bounded size::

    flat      [ q_proj q_proj q_proj . | o_proj o_proj . . ]
    stretches   q_proj           pad     o_proj        pad
    chunk 0     |--------------------------|
    chunk 1                                |--------------|

Of an element only its flat position in its matrix is stored (4 bytes, the indices of the layer); its slots follow from
the number of columns and the place of the accumulators, which are those of its stretch. So one chunk is a few
operations on whole vectors, however many tensors it runs through. Padding gets the slots of its flat tensor's first
matrix, at (0, 0): with a gradient of 0 it never raises an accumulator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_ds.optim.flat_segment import FlatSegment, padding_ranges


class Slots(NamedTuple):
    """Of one chunk: where in the flat tensor it lies, and [n] int64 places of each element in the accumulators."""

    chunk: slice
    rows: Tensor
    cols: Tensor


class _Stretch(NamedTuple):
    """Elements `begin .. end - 1` of a segment, or of padding."""

    segment: FlatSegment | None
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Attributes:
    place: in the flat tensor.
    stretches: that it runs through.
    lengths: [P] of them.
    num_cols, row_offsets, col_offsets: [P] of their matrices: columns, and where the accumulators begin.
    """

    place: slice
    stretches: list[_Stretch]
    lengths: Tensor
    num_cols: Tensor
    row_offsets: Tensor
    col_offsets: Tensor


class AccumulatorSlots:
    """The slots of one flat tensor; made once, right for whatever indices the segments have at each use.

    Args:
        segments: non-overlapping, ascending by offset, at least one.
        num_elements: of the flat tensor.
        offset_of: name -> first of the tensor's row accumulators; those of its columns follow.
        chunk_elements: elements looked at in one go.
        device: of the flat tensor.

    Memory: 28 bytes per stretch and chunk; while a chunk is looked at, 45 bytes an element.
    """

    def __init__(
        self,
        segments: list[FlatSegment],
        num_elements: int,
        offset_of: Callable[[str], int],
        *,
        chunk_elements: int,
        device: torch.device,
    ) -> None:
        self._device = device
        self._chunks: list[_Chunk] = []
        stretches = _all_stretches(segments, num_elements)
        for begin in range(0, num_elements, chunk_elements):
            place = slice(begin, min(begin + chunk_elements, num_elements))
            inside = list(_within(stretches, place))
            matrices = [stretch.segment or segments[0] for stretch in inside]
            row_offsets = [offset_of(matrix.name) for matrix in matrices]
            numbers = [
                [stretch.end - stretch.begin for stretch in inside],
                [matrix.num_cols for matrix in matrices],
                row_offsets,
                [offset + matrix.num_rows for offset, matrix in zip(row_offsets, matrices, strict=True)],
            ]
            self._chunks.append(_Chunk(place, inside, *torch.tensor(numbers, device=device).unbind()))

    def __iter__(self) -> Iterator[Slots]:
        """Chunk by chunk. No device synchronization."""
        for chunk in self._chunks:
            num_elements = chunk.place.stop - chunk.place.start
            positions = torch.cat([self._positions(stretch) for stretch in chunk.stretches])
            numbers = torch.arange(len(chunk.stretches), dtype=torch.int32, device=self._device)
            stretch_of = numbers.repeat_interleave(chunk.lengths, output_size=num_elements)
            num_cols = chunk.num_cols.to(positions.dtype).index_select(0, stretch_of)
            rows = torch.div(positions, num_cols, rounding_mode="trunc")
            cols = positions.sub_(num_cols.mul_(rows)).long()
            del positions, num_cols
            cols.add_(chunk.col_offsets.index_select(0, stretch_of))
            rows = rows.long().add_(chunk.row_offsets.index_select(0, stretch_of))
            del stretch_of
            yield Slots(chunk.place, rows, cols)

    def _positions(self, stretch: _Stretch) -> Tensor:
        if stretch.segment is None:
            return torch.zeros(stretch.end - stretch.begin, dtype=torch.int32, device=self._device)
        return stretch.segment.positions(stretch.begin, stretch.end, self._device)


def _all_stretches(segments: list[FlatSegment], num_elements: int) -> list[tuple[FlatSegment | None, int, int]]:
    """(segment or padding, first element, end) over the whole flat tensor, without empty ones."""
    stretches: list[tuple[FlatSegment | None, int, int]] = [
        (segment, segment.offset, segment.offset + segment.length) for segment in segments if segment.length
    ]
    stretches += [(None, begin, end) for begin, end in padding_ranges(segments, num_elements)]
    return sorted(stretches, key=lambda stretch: stretch[1])


def _within(stretches: list[tuple[FlatSegment | None, int, int]], place: slice) -> Iterator[_Stretch]:
    for segment, begin, end in stretches:
        first, last = max(begin, place.start), min(end, place.stop)
        if first < last:
            yield _Stretch(segment, first - begin, last - begin)
