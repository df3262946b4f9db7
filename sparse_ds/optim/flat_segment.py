"""What lies where in a flat fp32 tensor: ZeRO-3 hands the optimizer slices that join pieces of many tensors.

One flat tensor (one sub-group of one rank) with three targets, `.` being padding::

    flat      [ q_proj q_proj q_proj . | o_proj o_proj . . | bias bias . ]
    segments    ^offset 0, length 3      ^offset 4, length 2   ^offset 8, length 2

Padding is uninitialised memory (any bit pattern, NaN included), so nobody touches anything but the segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_ds.sparse.layout import SparseLayout


@dataclass(slots=True, eq=False)
class FlatSegment:
    """The real elements of one target tensor inside one flat tensor.

    A sparse segment says through `indices` where in the [num_rows, num_cols] matrix its elements lie. The tensor is
    read at every use and never copied, so after an event its owner either writes into it in place or assigns a new
    one: there is nothing to refresh. A dense segment (a fully trained head or bias) has `indices=None` and covers
    the consecutive row-major positions `start .. start + length - 1`; a 1-D tensor of n elements is a matrix of n
    rows and 1 column.

    Attributes:
        name: the target tensor. Segments of one tensor (in several flat tensors, or on several ranks) share it.
        offset: first element in the flat tensor.
        length: number of real elements; 0 is allowed (a rank that owns nothing of a tensor still registers it).
        num_rows, num_cols: shape of the whole target matrix.
        indices: [length] int32 or int64, flat row-major positions, any device; None for a dense segment.
        start: first flat position of a dense segment; 0 for a sparse one.
        block_rows, block_cols: sides of the blocks of a sparse segment. Larger ones than 1 x 1 are whole, one after the
            other, and `indices` are theirs on the grid (`sparse.layout`).
    """

    name: str
    offset: int
    length: int
    num_rows: int
    num_cols: int
    indices: Tensor | None = None
    start: int = 0
    block_rows: int = 1
    block_cols: int = 1

    @property
    def layout(self) -> SparseLayout:
        """Of the matrix."""
        return SparseLayout(self.num_rows, self.num_cols, 0, block_rows=self.block_rows, block_cols=self.block_cols)

    def positions(self, begin: int, end: int, device: torch.device) -> Tensor:
        """Flat row-major positions of elements `begin .. end - 1` of this segment: [end - begin] int32 or int64."""
        if self.indices is None:
            return torch.arange(self.start + begin, self.start + end, device=device)
        size = self.block_rows * self.block_cols
        assert self.indices.numel() * size == self.length, (
            f"segment {self.name!r}: {self.indices.numel()} indices for {self.length} values"
        )
        first, last = begin // size, -(-end // size)
        weights = self.layout.weights_of(self.indices[first:last].to(device))
        return weights[begin - first * size : end - first * size]

    def check(self, flat_numel: int) -> None:
        """Assert that the segment lies inside its flat tensor, and its positions (all are read) inside the matrix."""
        numel = self.num_rows * self.num_cols
        assert self.num_rows > 0 and self.num_cols > 0, (
            f"segment {self.name!r}: shape {self.num_rows} x {self.num_cols}"
        )
        end = self.offset + self.length
        assert min(self.offset, self.length) >= 0 and end <= flat_numel, (
            f"segment {self.name!r}: [{self.offset}, {end}) is outside of a flat tensor of {flat_numel}"
        )
        if self.indices is None:
            assert self.start >= 0 and self.start + self.length <= numel, (
                f"segment {self.name!r}: [{self.start}, {self.start + self.length}) is outside of a tensor of {numel}"
            )
            return
        assert self.start == 0, f"segment {self.name!r}: `start` belongs to dense segments"
        layout = self.layout
        shape = (self.length // layout.block_elements,)
        assert self.indices.dtype in (torch.int32, torch.int64) and self.indices.shape == shape, (
            f"segment {self.name!r}: {self.indices.dtype} indices {tuple(self.indices.shape)} for {self.length} values"
        )
        if self.length:
            lowest, highest = torch.aminmax(self.indices)
            end = layout.num_positions - 1
            assert lowest >= 0 and highest <= end, f"segment {self.name!r}: indices outside of 0 .. {end}"


def padding_ranges(segments: Sequence[FlatSegment], flat_numel: int) -> list[tuple[int, int]]:
    """[begin, end) of what lies between the segments, which ascend by offset; none of them is empty."""
    ends = [0, *(segment.offset + segment.length for segment in segments)]
    begins = [*(segment.offset for segment in segments), flat_numel]
    return [(end, begin) for end, begin in zip(ends, begins, strict=True) if end < begin]


def padding_positions(ranges: Sequence[tuple[int, int]], device: torch.device) -> Tensor | None:
    """[n] int64 positions in the flat tensor of the [begin, end) ranges of its padding; None without any."""
    pieces = [torch.arange(begin, end) for begin, end in ranges if begin < end]
    return torch.cat(pieces).to(device) if pieces else None
