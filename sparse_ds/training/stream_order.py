"""The order in which the samples of a stream are seen: the stream's own, which is the same for every world size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparse_ds.data.streaming import StreamedDataset
from sparse_ds.training.global_order import GlobalOrderSampler


class StreamOrderSampler(GlobalOrderSampler):
    """0, 1, 2, ... without end: one epoch holds more steps than any run makes."""

    def __iter__(self) -> Iterator[int]:
        yield from range(len(self))


def make_sampler(dataset: Any, global_batch_size: int, seed: int) -> GlobalOrderSampler:
    """The sampler of a run's training data; arguments as for `GlobalOrderSampler`."""
    kind = StreamOrderSampler if isinstance(dataset, StreamedDataset) else GlobalOrderSampler
    return kind(len(dataset), global_batch_size, seed)
