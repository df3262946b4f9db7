"""Files of samples, read row by row, with the place of every row so that an error can name it.

| suffix | holds | place of a row |
|---|---|---|
| `.jsonl` `.ndjson` | one JSON object a line; blank lines are skipped | line |
| `.json` | an array of JSON objects, or one object a line | line |
| `.csv` `.tsv` | a header line, then one sample a record; every field is text | line |
| `.parquet` | one sample a row | row |
| `.txt` | running text, no rows | |

Text is UTF-8, with or without a byte order mark. Nothing is cached and nothing is written, so several ranks may read
the same file at the same time. Only `.json` (an array) and `.txt` are held in memory as a whole.

A line or record that cannot be read raises, or, with `keep_broken`, is a `Row` that holds the error: the next one can
still be read. Where no next one can be found (JSON arrays and Parquet files that are broken, a CSV header) it always
raises.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow
import pyarrow.parquet

from sparse_ds.config.errors import UserError

# The csv module refuses fields above 128 Ki characters, which a long document exceeds.
_MAX_CSV_FIELD_CHARACTERS = 1 << 30


@dataclass(frozen=True, slots=True)
class Row:
    """One sample as the user wrote it.

    Attributes:
        fields: column name -> value, unchecked.
        location: where it came from, for error messages: `data/train.jsonl, line 7`.
        broken: why there is nothing in `fields`; None for a row that could be read.
    """

    fields: Mapping[str, Any]
    location: str
    broken: UserError | None = None


def read_text(path: Path) -> str:
    """The whole file as one string, without a byte order mark and with `\\n` line ends.

    Raises:
        UserError: the file is not UTF-8 (names the line and the byte).
    """
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _not_utf8(path, line, data[error.start]) from None
    return text.replace("\r\n", "\n")


def read_jsonl(path: Path, *, keep_broken: bool = False, expected: str = "one JSON object a line") -> Iterator[Row]:
    """One JSON object a line; blank lines are skipped.

    Args:
        path: the file.
        keep_broken: give lines that cannot be read as broken rows.
        expected: what an error says that the file should hold.
    """
    for number, line in _lines(path):
        if not line.strip():
            continue
        location = f"{path}, line {number}"
        try:
            yield Row(_json_object(json.loads(_decoded(line, path, number)), location), location)
        except UserError as error:
            yield _broken_row(error, location, keep_broken)
        except (ValueError, RecursionError) as error:
            broken = UserError(
                f"{location}: broken JSON: {_json_problem(error)}. Expected {expected}. Correct the line."
            )
            yield _broken_row(broken, location, keep_broken)


def read_json(path: Path, *, keep_broken: bool = False) -> Iterator[Row]:
    """A JSON array of objects; a file that does not open with `[` is read as one object a line."""
    with path.open("rb") as file:
        opens_array = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n").startswith(b"[")
    if not opens_array:
        expected = "an array of objects ([{...}, {...}]) or one object a line"
        yield from read_jsonl(path, keep_broken=keep_broken, expected=expected)
        return
    text = read_text(path)
    position = _skip_blanks(text, 0)
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    position = _skip_blanks(text, position + 1)
    while not text.startswith("]", position):
        line += text.count("\n", counted, position)
        counted = position
        location = f"{path}, line {line}"
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            place = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise UserError(
                f"{path}, line {place}: broken JSON: {_json_problem(error)}, in the array element that starts on line "
                f"{line}. Expected an array of objects ([{{...}}, {{...}}]). Correct the file."
            ) from None
        try:
            yield Row(_json_object(value, location), location)
        except UserError as error:
            yield _broken_row(error, location, keep_broken)
        position = _skip_blanks(text, position)
        if text.startswith(",", position):
            position = _skip_blanks(text, position + 1)
        elif not text.startswith("]", position):
            raise UserError(
                f"{location}: broken JSON: a comma or the closing ] is missing after the array element that starts "
                "here. Correct the file."
            )
    rest = _skip_blanks(text, position + 1)
    if rest < len(text):
        line = text.count("\n", 0, rest) + 1
        raise UserError(f"{path}, line {line}: broken JSON: text after the closing ] of the array. Remove it.")


def read_csv(path: Path, *, keep_broken: bool = False) -> Iterator[Row]:
    """A header line and one sample a record, separated by commas (`.csv`) or tabs (`.tsv`), quotes as in RFC 4180."""
    csv.field_size_limit(_MAX_CSV_FIELD_CHARACTERS)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # Bytes that are not UTF-8 come as lone surrogates, so that the record they are in is known.
    lines = (line.decode("utf-8", errors="surrogateescape") for _, line in _lines(path))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        location = f"{path}, line {line}"
        try:
            record = next(reader, None)
            if record is None:
                return
            _check_utf8(record, path, line)
            if header is not None and record and len(record) != len(header):
                raise UserError(
                    f"{location}: {len(record)} fields, expected {len(header)} as in the header ({', '.join(header)}). "
                    "Put fields that hold separators or line ends in double quotes."
                )
        except csv.Error as error:
            swallowed = f", with all lines up to {reader.line_num}" if reader.line_num > line else ""
            broken = UserError(
                f"{location}: broken record{swallowed}: {error}. Expected fields as in RFC 4180: a field that holds "
                "quotes, separators or line ends stands in double quotes, and quotes inside it are doubled."
            )
            yield _broken_row(broken, location, keep_broken and header is not None)
        except UserError as error:
            yield _broken_row(error, location, keep_broken and header is not None)
        else:
            if header is None:
                header = _checked_header(record, location) if record else None
            elif record:
                yield Row(dict(zip(header, record, strict=True)), location)


def read_parquet(path: Path, *, keep_broken: bool = False) -> Iterator[Row]:
    """One sample a row; row numbers count from 1. A file that is broken always raises."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read as Parquet: {error} Check that the file is complete and that its suffix is right."
        ) from None


class RowReader(Protocol):
    """From a file to its rows."""

    def __call__(self, path: Path, *, keep_broken: bool = False) -> Iterator[Row]: ...


ROW_READERS: dict[str, RowReader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
TEXT_SUFFIX = ".txt"
KNOWN_SUFFIXES = (*ROW_READERS, TEXT_SUFFIX)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line with its end), one line in memory at a time."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, line[error.start]) from None


def _check_utf8(record: list[str], path: Path, line: int) -> None:
    """Raise a UserError if a field holds bytes that `_lines` could not decode; it names the record's first line."""
    for field in record:
        try:
            field.encode()
        except UnicodeEncodeError as error:
            raise _not_utf8(path, line, ord(field[error.start]) - 0xDC00) from None


def _broken_row(error: UserError, location: str, keep_broken: bool) -> Row:
    if not keep_broken:
        raise error
    return Row({}, location, error)


def _not_utf8(path: Path, line: int, byte: int) -> UserError:
    return UserError(
        f"{path}, line {line}: not UTF-8 (byte 0x{byte:02x}). Save the file as UTF-8, for example with "
        f"`iconv -f latin1 -t utf-8`."
    )


def _json_problem(error: Exception) -> str:
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def _json_object(value: object, location: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f"{location}: a sample is {_json_kind(value)}, expected a JSON object with named fields, for example "
            '{"prompt": "...", "completion": "..."}.'
        )
    return value


def _json_kind(value: object) -> str:
    if value is None:
        return "null"
    kinds: dict[type, str] = {list: "an array", str: "a string", bool: "a boolean"}
    return kinds.get(type(value), "a number")


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _checked_header(header: list[str], location: str) -> list[str]:
    names = [name.strip() for name in header]
    if "" in names:
        raise UserError(f"{location}: column {names.index('') + 1} of the header has no name. Name every column.")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{location}: the header names {', '.join(repeated)} more than once. Column names must differ.")
    return names
