"""Rows that cannot be used: the first one ends the run, or all of them are left out and counted.

A row is bad if it cannot be read (broken JSON, not UTF-8), has not the fields of its format, is refused by the chat
template, or holds nothing to learn. Which of the two happens is `data.on_bad_row`. A sample of which nothing is left to
learn once it is cut to `data.sequence_length` is left out in any case: that it is cut was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar

from sparse_ds.config.errors import UserError
from sparse_ds.data.reading import Row

OnBadRow = Literal["error", "skip"]
T = TypeVar("T")


class NothingLeftError(UserError):
    """A sample has been cut, and what is left of it is prompt."""


class BadRows:
    """Takes the mistakes of one source's rows.

    Args:
        field: the config field that the source comes from, for messages.
        on_bad_row: `error`: the first ends it; `skip`: they are left out and counted. Samples of which nothing is left
            are always left out and counted.

    Attributes:
        first: what is wrong with the first row that was left out; None if there is none.
    """

    def __init__(self, field: str, on_bad_row: OnBadRow = "error") -> None:
        self.field, self.on_bad_row = field, on_bad_row
        self._numbers: list[int] = []
        self._first = -1
        self.first: str | None = None

    @property
    def numbers(self) -> list[int]:
        """The rows that were left out, ascending, counted from 0."""
        return sorted(self._numbers)

    def refuse(self, number: int, error: UserError) -> None:
        """Row `number` cannot be used, and `error` says why.

        Raises:
            UserError: `error`, unless bad rows are skipped.
        """
        if self.on_bad_row == "error" and not isinstance(error, NothingLeftError):
            raise UserError(f"{error} (data.on_bad_row skip leaves such rows out.)")
        if self.first is None or number < self._first:
            self._first, self.first = number, str(error)
        self._numbers.append(number)

    def convert(self, rows: Iterable[Row], to_sample: Callable[[Row], T]) -> Iterator[tuple[int, T]]:
        """(number of the row from 0, its sample) of all rows that can be used."""
        for number, row in enumerate(rows):
            try:
                if row.broken is not None:
                    raise row.broken
                sample = to_sample(row)
            except UserError as error:
                self.refuse(number, error)
                continue
            yield number, sample

    def describe(self, num_samples: int) -> str | None:
        """One line for the start of a run; None if all rows could be used.

        Args:
            num_samples: rows that could be used.
        """
        if not self._numbers:
            return None
        num_all = num_samples + len(self._numbers)
        return f"{len(self._numbers):,} of {num_all:,} rows are left out. The first: {self.first}"
