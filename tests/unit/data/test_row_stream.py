"""The order of a stream: endless, complete in every pass, shuffled within its buffer, mixed by weights, repeatable."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from random import Random

import pytest

from sparse_ds.config.errors import UserError
from sparse_ds.data.row_stream import StreamPart, shuffle_in_buffer, stream_rows


def part(name: str, num_rows: int, weight: float = 1.0) -> StreamPart[str]:
    return StreamPart(name, weight, lambda number: iter([f"{name}{number}.{row}" for row in range(num_rows)]))


def take(num_rows: int, *parts: StreamPart[str], buffer_rows: int = 1, seed: int = 0) -> list[str]:
    return list(islice(stream_rows(list(parts), buffer_rows=buffer_rows, seed=seed), num_rows))


def test_a_buffer_of_one_keeps_the_order() -> None:
    assert take(7, part("a", 3)) == ["a0.0", "a0.1", "a0.2", "a1.0", "a1.1", "a1.2", "a2.0"]


@pytest.mark.parametrize("buffer_rows", [1, 2, 10, 99, 100, 1000])
def test_every_row_comes_once(buffer_rows: int) -> None:
    drawn = list(shuffle_in_buffer(range(100), buffer_rows, Random(0)))
    assert sorted(drawn) == list(range(100))
    # No row comes earlier than the buffer allows.
    assert all(row <= position + buffer_rows for position, row in enumerate(drawn))
    assert (drawn == list(range(100))) == (buffer_rows == 1)


def test_the_buffer_is_drawn_from_evenly() -> None:
    """The first row handed out is any of the first ten: 200 of 2000 each, standard deviation 13.4."""
    first = Counter(next(shuffle_in_buffer(range(100), 10, Random(seed))) for seed in range(2000))
    assert set(first) == set(range(10))
    assert all(130 < count < 270 for count in first.values())


def test_passes_go_on_within_the_buffer() -> None:
    """Over passes of 5 rows with a buffer of 50, all rows stay about equally often."""
    counts = Counter(row.split(".")[1] for row in take(5000, part("a", 5), buffer_rows=50))
    assert all(abs(count - 1000) <= 50 for count in counts.values())


def test_weights() -> None:
    rows = take(10_000, part("a", 7, weight=3), part("b", 1000, weight=1), buffer_rows=5)
    share = sum(row.startswith("a") for row in rows) / len(rows)
    # Standard deviation 0.0043.
    assert abs(share - 0.75) < 0.02
    # What comes of one source does not depend on the others.
    alone = take(10_000, part("a", 7), buffer_rows=5)
    of_a = [row for row in rows if row.startswith("a")]
    assert of_a == alone[: len(of_a)]


def test_the_seed_decides() -> None:
    parts = (part("a", 50), part("b", 50))
    first, again, other = (take(200, *parts, buffer_rows=20, seed=seed) for seed in (3, 3, 4))
    assert first == again != other


def test_a_source_without_rows() -> None:
    with pytest.raises(UserError, match=r"data\.train: a has no usable row"):
        take(1, part("a", 0))
