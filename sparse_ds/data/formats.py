"""The shapes in which users write samples: what they are called, how they are told apart, what they become.

| format | fields of a row | becomes |
|---|---|---|
| `alpaca` | `instruction`, `output`, optional `input` | PromptCompletion, in the Alpaca template |
| `prompt_completion` | `prompt`, `completion` | PromptCompletion, joined as they are |
| `messages` | `messages`: a list of `{"role", "content"}` | Conversation |
| `text` | `text`, or a `.txt` file | Text, or a stream of blocks |
| `classification` | `text`, `sentence`, `text` + `text_pair` or `sentence1` + `sentence2`; `label` | LabeledText |

A further format is one function from a row to one of the first three samples and one entry in `FORMATS`. The task
decides whether `classification` is meant, because its rows fit `text` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparse_ds.config.errors import UserError
from sparse_ds.data.reading import Row
from sparse_ds.data.sources import RowSource, TextSource
from sparse_ds.data.templates import Message, alpaca_prompt

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A prompt that is read and a completion that is learned."""

    prompt: str
    completion: str
    location: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, of which the assistant's are learned; it ends with one of them."""

    messages: tuple[Message, ...]
    location: str


@dataclass(frozen=True, slots=True)
class Text:
    """A document of which every token is learned."""

    text: str
    location: str


@dataclass(frozen=True, slots=True)
class LabeledText:
    """A text, or a pair of texts, of which the label is learned."""

    text: str
    label: str
    location: str
    pair: str | None = None


Sample = PromptCompletion | Conversation | Text


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a sample.

    Attributes:
        name: as in `data.format`.
        fields: the columns by which it is detected, all of them required.
        to_sample: checks a row and converts it; raises UserError naming file, line and field.
    """

    name: str
    fields: tuple[str, ...]
    to_sample: Callable[[Row], Sample]


def alpaca_sample(row: Row) -> PromptCompletion:
    """`instruction`, `output`, and `input` which may be absent, null or empty."""
    input_text = "" if row.fields.get("input") is None else _text(row, "input")
    prompt = alpaca_prompt(_text(row, "instruction"), input_text)
    return PromptCompletion(prompt, _learned_text(row, "output"), row.location)


def prompt_completion_sample(row: Row) -> PromptCompletion:
    """`prompt` and `completion`; the prompt may be empty."""
    return PromptCompletion(_text(row, "prompt"), _learned_text(row, "completion"), row.location)


def text_sample(row: Row) -> Text:
    """`text`, one document."""
    return Text(_learned_text(row, "text"), row.location)


def messages_sample(row: Row) -> Conversation:
    """`messages`, cut after the last assistant turn: what follows it would be read and never learned from."""
    turns = _value(row, "messages")
    if not isinstance(turns, list):
        raise _wrong_type(row, "messages", turns, 'a list of {"role": "...", "content": "..."}')
    messages = tuple(_message(row, number, turn) for number, turn in enumerate(turns))
    last = max((number for number, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise UserError(
            f'{row.location}: field "messages" has no turn of the role assistant, so there is nothing to learn. '
            "Add the answer or remove the sample."
        )
    if messages[0]["role"] == "assistant":
        raise UserError(
            f'{row.location}: field "messages" starts with a turn of the role assistant, expected what it answers. '
            "Add the user's turn, or write the sample as prompt and completion."
        )
    return Conversation(messages[: last + 1], row.location)


TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", "text_pair"),
)
"""Fields of the two texts of a pair: those of GLUE, and transformers' own words."""


def labeled_sample(row: Row) -> LabeledText:
    """A text or a pair of texts, and its `label`: text, or an integer, which is taken as text."""
    names = row.fields
    first, second = next((pair for pair in TEXT_PAIRS if names.keys() >= set(pair)), ("", ""))
    if first and names[second] is not None:
        return LabeledText(_learned_text(row, first), _label(row), row.location, pair=_text(row, second))
    half = next((pair for pair in TEXT_PAIRS[:3] if pair[0] in names), None)
    if half is not None:
        _text(row, half[1])  # raises: it is missing or null
    if "text" not in names and "sentence" not in names:
        raise UserError(
            f"{row.location}: no text to classify; the fields there are {', '.join(map(str, names)) or 'none'}. "
            "Expected `text` or `sentence`, or of pairs " + "; ".join(map(" and ".join, TEXT_PAIRS)) + "."
        )
    return LabeledText(_learned_text(row, "text" if "text" in names else "sentence"), _label(row), row.location)


def _label(row: Row) -> str:
    if "label" not in row.fields:
        raise UserError(
            f'{row.location}: field "label" is missing; the fields there are {", ".join(map(str, row.fields))}. Add '
            "it, or set model.task to causal_lm."
        )
    value = row.fields["label"]
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer and not (isinstance(value, str) and value):
        raise _wrong_type(row, "label", value, "an integer or text that is not empty")
    return str(value)


FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format("alpaca", ("instruction", "output"), alpaca_sample),
        Format("prompt_completion", ("prompt", "completion"), prompt_completion_sample),
        Format("messages", ("messages",), messages_sample),
        Format("text", ("text",), text_sample),
    )
}
FORMAT_NAMES = ("auto", *FORMATS)


def choose_format(source: RowSource | TextSource, data_format: str, field: str) -> Format:
    """The format to read `source` with: the one asked for or, for `auto`, the one that its first row shows.

    A row with the fields of `text` and of another format (the published Alpaca data has both) is read as the other.

    Raises:
        UserError: unknown format, no format or more than one fits, running text read as rows.
    """
    if data_format not in FORMAT_NAMES:
        raise UserError(f"data.format is {data_format!r}, expected one of {', '.join(FORMAT_NAMES)}.")
    if isinstance(source, TextSource):
        if data_format not in ("auto", "text"):
            raise UserError(
                f"data.format is {data_format!r}, but {field} is a .txt file, which holds running text. "
                "Set data.format to text, or give a file with rows."
            )
        return FORMATS["text"]
    if data_format != "auto":
        return FORMATS[data_format]
    seen = source.first.fields
    fitting = [entry for entry in FORMATS.values() if all(name in seen for name in entry.fields)]
    if len(fitting) > 1:
        fitting = [entry for entry in fitting if entry.name != "text"]
    if len(fitting) == 1:
        return fitting[0]
    is_labeled = "label" in seen and bool({"text", "sentence", "sentence1"} & set(seen))
    known = "; ".join(f"{entry.name} ({', '.join(entry.fields)})" for entry in FORMATS.values())
    columns = ", ".join(map(str, seen)) or "none"
    if fitting:
        names = " and ".join(entry.name for entry in fitting)
        raise UserError(
            f"{field}: {source.first.location} fits the formats {names}; its fields are {columns}. Set data.format to "
            "the one that you mean."
        )
    raise UserError(
        f"{field}: no known format fits {source.first.location}; its fields are {columns}. Known formats and their "
        f"fields: {known}. "
        + ("To learn its labels, set model.task to sequence_classification." if is_labeled else "")
        + ("" if is_labeled else "Rename the fields to those of one format.")
    )


def _message(row: Row, number: int, turn: object) -> Message:
    name = f"messages[{number}]"
    if not isinstance(turn, Mapping):
        raise _wrong_type(row, name, turn, '{"role": "...", "content": "..."}')
    inner = Row(turn, row.location)
    role = _text(inner, "role", f"{name}.role")
    if role not in ROLES:
        raise UserError(f'{row.location}: field "{name}.role" is {role!r}, expected one of {", ".join(ROLES)}.')
    take = _learned_text if role == "assistant" else _text
    return {"role": role, "content": take(inner, "content", f"{name}.content")}


def _learned_text(row: Row, name: str, shown: str | None = None) -> str:
    text = _text(row, name, shown)
    if not text.strip():
        raise UserError(
            f'{row.location}: field "{shown or name}" is empty, so there is nothing to learn. Fill it in or remove the '
            "sample."
        )
    return text


def _text(row: Row, name: str, shown: str | None = None) -> str:
    value = _value(row, name, shown)
    if not isinstance(value, str):
        raise _wrong_type(row, shown or name, value, "text")
    return value


def _value(row: Row, name: str, shown: str | None = None) -> object:
    if name not in row.fields:
        columns = ", ".join(map(str, row.fields)) or "none"
        raise UserError(
            f'{row.location}: field "{shown or name}" is missing; the fields there are {columns}. Add it, or set '
            f"data.format to the format that the data has ({', '.join(FORMATS)})."
        )
    value: object = row.fields[name]
    return value


def _wrong_type(row: Row, name: str, value: object, expected: str) -> UserError:
    got = "null" if value is None else f"{type(value).__name__} ({_shortened(repr(value))})"
    return UserError(f'{row.location}: field "{name}" is {got}, expected {expected}.')


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
