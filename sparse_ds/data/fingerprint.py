"""A sha256 of tokenized data: a run goes on with the samples with which it began."""

from __future__ import annotations

import hashlib

import pyarrow
import pyarrow.compute
from datasets import Dataset

from sparse_ds.data.streaming import StreamedDataset

_ROWS_AT_ONCE = 1000


def dataset_fingerprint(dataset: Dataset | StreamedDataset) -> str:
    """sha256 over all rows in their order: names of the columns, lengths of the lists and their numbers.

    Of a stream it is what can be known without reading it, see there.

    How the rows are cut into chunks, files and the source's name have no effect.

    Args:
        dataset: columns of integers or of lists of integers; or a stream.

    Memory: some thousand rows.
    """
    if isinstance(dataset, StreamedDataset):
        return dataset.fingerprint()
    columns = {name: (hashlib.sha256(), hashlib.sha256()) for name in sorted(dataset.column_names)}
    for table in dataset.with_format("arrow").iter(_ROWS_AT_ONCE):
        for name, (lengths, numbers) in columns.items():
            for chunk in table.column(name).chunks:
                if pyarrow.types.is_list(chunk.type) or pyarrow.types.is_large_list(chunk.type):
                    lengths.update(_bytes(pyarrow.compute.list_value_length(chunk)))
                    chunk = chunk.flatten()
                numbers.update(_bytes(chunk))
    combined = hashlib.sha256(f"{len(dataset)}".encode())
    for name, (lengths, numbers) in columns.items():
        combined.update(f"\0{name}\0".encode() + lengths.digest() + numbers.digest())
    return combined.hexdigest()


def _bytes(integers: pyarrow.Array) -> memoryview:
    return memoryview(integers.cast(pyarrow.int64()).to_numpy(zero_copy_only=False).astype("<i8", copy=False)).cast("B")
