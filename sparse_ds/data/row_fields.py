"""One field of a row, checked: what formats are made of. Every mistake names the place, the field and what is there."""

from __future__ import annotations

from sparse_ds.config.errors import UserError
from sparse_ds.data.reading import Row

_MAX_SHOWN_CHARACTERS = 40


def field_value(row: Row, name: str, shown: str | None = None) -> object:
    """The field as it is. `shown` is its name for messages, where that is not `name`."""
    if name not in row.fields:
        columns = ", ".join(map(str, row.fields)) or "none"
        raise UserError(
            f'{row.location}: field "{shown or name}" is missing; the fields there are {columns}. Add it, or set '
            "data.format to the format that the data has."
        )
    value: object = row.fields[name]
    return value


def text_field(row: Row, name: str, shown: str | None = None) -> str:
    """Text, which may be empty."""
    return checked_text(row, field_value(row, name, shown), shown or name)


def learned_field(row: Row, name: str, shown: str | None = None) -> str:
    """Text of which something can be learned: not blank."""
    return learned_text(row, text_field(row, name, shown), shown or name)


def checked_text(row: Row, value: object, name: str) -> str:
    """`value`, if it is text that can be written as UTF-8 (JSON's escapes allow half of a surrogate pair)."""
    if not isinstance(value, str):
        raise wrong_type(row, name, value, "text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f'{row.location}: field "{name}" holds half of a surrogate pair (U+{ord(value[error.start]):04X}, at '
            f"character {error.start + 1}), which is no text. Remove it."
        ) from None
    return value


def learned_text(row: Row, text: str, name: str) -> str:
    """`text`, if it is not blank."""
    if not text.strip():
        raise UserError(
            f'{row.location}: field "{name}" is empty, so there is nothing to learn. Fill it in or remove the sample.'
        )
    return text


def wrong_type(row: Row, name: str, value: object, expected: str) -> UserError:
    """The error for a field that holds something else."""
    got = "null" if value is None else f"{type(value).__name__} ({_shortened(repr(value))})"
    return UserError(f'{row.location}: field "{name}" is {got}, expected {expected}.')


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[: _MAX_SHOWN_CHARACTERS - 3]}..."
