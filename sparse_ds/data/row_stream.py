"""The order of a stream's rows: endless, shuffled within a buffer, mixed by weights; the same wherever it is made.

    source: rows ... end, rows again ...  -> buffer of B rows, each draw replaced by the next row -> \\
    source: ...                                                                                       weights -> rows

The order depends on the sources, B, the weights and the seed, on nothing else: not on the rank, nor on how far a run
has come before it went on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Generic, TypeVar

from sparse_ds.config.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class StreamPart(Generic[T]):
    """One source of a stream.

    Attributes:
        name: for messages.
        weight: its share of the rows, relative to the other sources' weights; above 0.
        open_pass: begins pass 0, 1, ... over the rows that can be used.
    """

    name: str
    weight: float
    open_pass: Callable[[int], Iterator[T]]


def stream_rows(parts: list[StreamPart[T]], *, buffer_rows: int, seed: int) -> Iterator[T]:
    """Rows without end.

    Args:
        parts: the sources.
        buffer_rows: each row is drawn from so many of its source; 1 keeps the order.
        seed: of all that is drawn.

    Raises:
        UserError: a source has no usable row in a whole pass.
    """
    sources = [
        shuffle_in_buffer(_repeat(part), buffer_rows, Random(f"{seed} {number}")) for number, part in enumerate(parts)
    ]
    if len(sources) == 1:
        yield from sources[0]
        return
    random = Random(f"{seed} mixture")
    weights = [part.weight for part in parts]
    while True:
        (source,) = random.choices(sources, weights)
        yield next(source)


def shuffle_in_buffer(rows: Iterable[T], buffer_rows: int, random: Random) -> Iterator[T]:
    """All rows, each drawn from the `buffer_rows` that are there. Memory: so many rows."""
    buffer: list[T] = []
    for row in rows:
        if len(buffer) < buffer_rows:
            buffer.append(row)
            continue
        drawn = int(random.random() * buffer_rows)
        yield buffer[drawn]
        buffer[drawn] = row
    random.shuffle(buffer)
    yield from buffer


def _repeat(part: StreamPart[T]) -> Iterator[T]:
    for number in count():
        is_empty = True
        for row in part.open_pass(number):
            is_empty = False
            yield row
        if is_empty:
            raise UserError(f"data.train: {part.name} has no usable row.")
