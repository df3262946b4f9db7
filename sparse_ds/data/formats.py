"""The shapes in which users write samples: what they are called, how they are told apart, what they become.

| format | fields of a row | becomes |
|---|---|---|
| `alpaca` | `instruction`, `output` or `response`, optional `input` or `context` | PromptCompletion, Alpaca's prompt |
| `prompt_completion` | `prompt` + `completion` or `response`; `question` + `answer` | PromptCompletion, as they are |
| `messages` | `messages`: a list of `{"role", "content"}` | Conversation |
| `sharegpt` | `conversations`: a list of `{"from", "value"}`; optional `system` | Conversation |
| `text` | `text`, or a `.txt` file | Text, or a stream of blocks |
| `classification` | `text`, `sentence`, `text` + `text_pair` or `sentence1` + `sentence2`; `label` | LabeledText |

With a template for all formats (`data.template`) the first two become conversations of one question and one answer.

A further format is one function from a row to one of the first three samples and one entry in `FORMATS`. The task
decides whether `classification` is meant, because its rows fit `text` as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparse_ds.config.errors import UserError
from sparse_ds.data.conversations import messages_sample, sharegpt_sample
from sparse_ds.data.reading import Row
from sparse_ds.data.row_fields import learned_field, text_field, wrong_type
from sparse_ds.data.samples import Conversation, LabeledText, PromptCompletion, Sample, Text
from sparse_ds.data.sources import RowSource, TextSource
from sparse_ds.data.templates import alpaca_prompt

_ALPACA = (("instruction", "output"), ("instruction", "response"))
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a sample.

    Attributes:
        name: as in `data.format`.
        variants: sets of columns by each of which it is detected, all of the set required.
        to_sample: checks a row and converts it; raises UserError naming file, line and field.
        to_conversation: the same for a template that wraps all formats; None where the two are one, or it is no talk.
    """

    name: str
    variants: tuple[tuple[str, ...], ...]
    to_sample: Callable[[Row], Sample]
    to_conversation: Callable[[Row], Conversation] | None = None

    def fits(self, row: Row) -> bool:
        """Whether the row has the columns."""
        return any(all(name in row.fields for name in variant) for variant in self.variants)


def alpaca_sample(row: Row) -> PromptCompletion:
    """`instruction`, `output`, and `input` which may be absent, null or empty."""
    instruction, input_text, output = _alpaca_texts(row)
    return PromptCompletion(alpaca_prompt(instruction, input_text), output, row.location)


def alpaca_conversation(row: Row) -> Conversation:
    """The user says the instruction and, after a blank line, the input."""
    instruction, input_text, output = _alpaca_texts(row)
    asked = f"{instruction}\n\n{input_text}" if input_text.strip() else instruction
    return _exchange(asked, output, row)


def prompt_completion_sample(row: Row) -> PromptCompletion:
    """`prompt` and `completion`; the prompt may be empty."""
    asked, answered = _chosen(row, _PAIRS)
    return PromptCompletion(text_field(row, asked), learned_field(row, answered), row.location)


def prompt_completion_conversation(row: Row) -> Conversation:
    """The user says the prompt."""
    sample = prompt_completion_sample(row)
    return _exchange(sample.prompt, sample.completion, row)


def text_sample(row: Row) -> Text:
    """`text`, one document."""
    return Text(learned_field(row, "text"), row.location)


def _alpaca_texts(row: Row) -> tuple[str, str, str]:
    instruction, output = _chosen(row, _ALPACA)
    given = next((name for name in ("input", "context") if row.fields.get(name) is not None), None)
    input_text = "" if given is None else text_field(row, given)
    return text_field(row, instruction), input_text, learned_field(row, output)


def _chosen(row: Row, variants: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    """The pair of columns that the row has, or else the first, which an error then names."""
    return next((pair for pair in variants if all(name in row.fields for name in pair)), variants[0])


def _exchange(asked: str, answered: str, row: Row) -> Conversation:
    messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
    return Conversation(messages, row.location)


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
        return LabeledText(learned_field(row, first), _label(row), row.location, pair=text_field(row, second))
    half = next((pair for pair in TEXT_PAIRS[:3] if pair[0] in names), None)
    if half is not None:
        text_field(row, half[1])  # raises: it is missing or null
    if "text" not in names and "sentence" not in names:
        raise UserError(
            f"{row.location}: no text to classify; the fields there are {', '.join(map(str, names)) or 'none'}. "
            "Expected `text` or `sentence`, or of pairs " + "; ".join(map(" and ".join, TEXT_PAIRS)) + "."
        )
    return LabeledText(learned_field(row, "text" if "text" in names else "sentence"), _label(row), row.location)


def _label(row: Row) -> str:
    if "label" not in row.fields:
        raise UserError(
            f'{row.location}: field "label" is missing; the fields there are {", ".join(map(str, row.fields))}. Add '
            "it, or set model.task to causal_lm."
        )
    value = row.fields["label"]
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer and not (isinstance(value, str) and value):
        raise wrong_type(row, "label", value, "an integer or text that is not empty")
    return str(value)


FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format("alpaca", _ALPACA, alpaca_sample, alpaca_conversation),
        Format("prompt_completion", _PAIRS, prompt_completion_sample, prompt_completion_conversation),
        Format("messages", (("messages",),), messages_sample),
        Format("sharegpt", (("conversations",),), sharegpt_sample),
        Format("text", (("text",),), text_sample),
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
    fitting = [entry for entry in FORMATS.values() if entry.fits(source.first)]
    if len(fitting) > 1:
        fitting = [entry for entry in fitting if entry.name != "text"]
    if len(fitting) == 1:
        return fitting[0]
    is_labeled = "label" in seen and bool({"text", "sentence", "sentence1"} & set(seen))
    known = "; ".join(f"{entry.name} ({', '.join(entry.variants[0])})" for entry in FORMATS.values())
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
