"""Several samples in one row of `sequence_length` tokens, by best-fit decreasing.

    lengths 5 4 3 3 2 1, rows of 8      | 5 5 5 5 5 3 3 3 |
                                        | 4 4 4 4 3 3 3 1 |        each digit a token of the sample of that length
                                        | 2 2 . . . . . . |

Longest first, every sample goes into the row with the least room that still holds it, or opens a new row. No sample is
cut. In a row nothing of one sample reaches another (`collation.PackedCollator`): position ids begin anew, attention
stays within the sample, and the first token of a sample is never a label.

Samples of the same length are taken in the order in which they are given. A run gives them in its global order of the
first epoch, so the rows depend on data, seed and `sequence_length`, not on ranks. Rows stay for the whole run; every
epoch shuffles them.

Best-fit decreasing: Johnson, Demers, Ullman, Garey, Graham, "Worst-case performance bounds for simple one-dimensional
packing algorithms", 1974 (at most 11/9 of the fewest rows, and a constant). For language models: Ding et al., "Fewer
Truncations Improve Language Modeling", arXiv 2404.10830, section 3; departure: nothing is split here, since the
tokenizer has cut what is longer than a row.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute
from datasets import Dataset
from torch.utils import data as torch_data

from sparse_ds.data.fingerprint import dataset_fingerprint

_ROWS_AT_ONCE = 10_000
_Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Which samples stand in which row; 8 bytes a sample and a row.

    Attributes:
        samples: int64 [S]: every sample once, row after row.
        starts: int64 [R + 1]: row r holds `samples[starts[r] : starts[r + 1]]`, at least one.
    """

    samples: _Integers
    starts: _Integers

    def __len__(self) -> int:
        return len(self.starts) - 1

    def samples_of(self, row: int) -> list[int]:
        """The samples of a row, in their order."""
        members: list[int] = self.samples[self.starts[row] : self.starts[row + 1]].tolist()
        return members


def pack(lengths: Sequence[int] | _Integers, row_length: int, order: Sequence[int] | _Integers) -> Packing:
    """Best-fit decreasing in O(S log S).

    Args:
        lengths: tokens of every sample, each 1 to `row_length`.
        row_length: tokens of a row.
        order: a permutation of the samples; decides between samples of the same length.
    """
    lengths, order = np.asarray(lengths, np.int64), np.asarray(order, np.int64)
    assert len(order) == len(lengths)
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= row_length)
    by_length = order[np.argsort(-lengths[order], kind="stable")]
    rows: list[list[int]] = []
    # Rooms (tokens left in a row) of which there are rows, ascending, and those rows.
    rooms: list[int] = []
    rows_with: dict[int, list[int]] = {}
    for sample, length in zip(by_length.tolist(), lengths[by_length].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, row = row_length, len(rows)
            rows.append([])
        else:
            room = rooms[place]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[place], rows_with[room]
        rows[row].append(sample)
        left = room - length
        if left:
            if left not in rows_with:
                insort(rooms, left)
                rows_with[left] = []
            rows_with[left].append(row)
    samples = np.fromiter((sample for row in rows for sample in row), np.int64, len(lengths))
    return Packing(samples, np.cumsum([0, *map(len, rows)], dtype=np.int64))


class PackedDataset(torch_data.Dataset[dict[str, Any]]):
    """Tokenized samples, several a row.

    Args:
        dataset: columns `input_ids` and `labels`.
        row_length: tokens of a row; no sample is longer.
        order: a permutation of the samples, see `pack`.
    """

    def __init__(self, dataset: Dataset, row_length: int, order: Sequence[int] | _Integers) -> None:
        self._dataset = dataset
        self.row_length = row_length
        lengths = sample_lengths(dataset)
        self.num_tokens = int(lengths.sum())
        self.packing = pack(lengths, row_length, order)

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, row: int) -> dict[str, list[list[int]]]:
        """`input_ids` and `labels` of every sample of the row."""
        columns: dict[str, list[list[int]]] = self._dataset[self.packing.samples_of(row)]
        return columns

    def fingerprint(self) -> str:
        """sha256 of the samples and of which stand in which row."""
        digest = hashlib.sha256(dataset_fingerprint(self._dataset).encode())
        for array in (self.packing.samples, self.packing.starts):
            digest.update(array.astype("<i8", copy=False).tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """One line for the start of a run."""
        num_samples, fill = len(self._dataset), self.num_tokens / (len(self) * self.row_length)
        return (
            f"{num_samples:,} samples packed into {len(self):,} rows of {self.row_length:,} tokens "
            f"({num_samples / len(self):.1f} a row), {fill:.1%} full"
        )


def sample_lengths(dataset: Dataset) -> _Integers:
    """Tokens of every sample, int64 [S]; some thousand samples are held at a time."""
    tables = dataset.select_columns("input_ids").with_format("arrow").iter(_ROWS_AT_ONCE)
    lengths = [pyarrow.compute.list_value_length(table.column("input_ids")).to_numpy() for table in tables]
    return np.concatenate(lengths).astype(np.int64) if lengths else np.zeros(0, np.int64)
