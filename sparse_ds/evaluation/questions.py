"""Rows of a file to questions.

| kind | a row has | detected by |
|---|---|---|
| `multiple_choice` | a question, `choices`, `gold` (or `answer`, `label`) | `choices` |
| `continuation` | a question, `continuation` | `continuation` |
| `exact_match` | a question, `answer` (or `target`, `reference`, `completion`, `output`) | the rest |

The question is the first of `query`, `question`, `prompt`, `input` and `context` that is there.

`gold` counts from 0, or is a letter from A. `prompt` and `reference` of the task replace the field by a text with
fields in braces (Python's format syntax: `{question}`, `{choices[0]}`; a brace itself is doubled).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePath

from sparse_ds.config.errors import UserError
from sparse_ds.config.tasks import TaskConfig, find_idle_keys
from sparse_ds.data.reading import Row
from sparse_ds.data.sources import TextSource, open_source

PROMPT_FIELDS = ("query", "question", "prompt", "input", "context")
GOLD_FIELDS = ("gold", "answer", "label")
REFERENCE_FIELDS = ("answer", "target", "reference", "completion", "output")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        prompt: what the model reads.
        choices: texts of which `choices[gold]` is right; one for a continuation, none for exact match.
        gold: number of the right choice.
        reference: the right answer of exact match, else "".
        location: the row, for messages.
    """

    prompt: str
    choices: tuple[str, ...]
    gold: int
    reference: str
    location: str


@dataclass(frozen=True)
class QuestionSet:
    """One task, read and checked; `kind` is none of `auto`."""

    name: str
    kind: str
    settings: TaskConfig
    questions: tuple[Question, ...]

    def digest(self) -> str:
        """sha256 of all that is asked."""
        hashed = hashlib.sha256(f"{self.name}\0{self.kind}\0{self.settings!r}".encode())
        for each in self.questions:
            hashed.update(repr((each.prompt, each.choices, each.gold, each.reference)).encode())
        return hashed.hexdigest()


def read_tasks(tasks: list[TaskConfig], field: str) -> list[QuestionSet]:
    """Read all tasks of a run.

    Args:
        tasks: their settings.
        field: where they come from, for messages.

    Raises:
        UserError: as `read_task`; two tasks of one name.
    """
    read = [read_task(task, f"{field}[{number}]" if len(tasks) > 1 else field) for number, task in enumerate(tasks)]
    names = [task.name for task in read]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{field}: {names.count(name)} tasks are called {name!r}. Give each its own `name`.")
    return read


def read_task(task: TaskConfig, field: str) -> QuestionSet:
    """Read and check one task.

    Raises:
        UserError: no such file, rows of no known kind, a missing field or one of the wrong type, a gold that is no
            choice, settings that this kind does not use.
    """
    source = open_source(task.source, field=field, split="test")
    if isinstance(source, TextSource):
        raise UserError(f"{field}: {source.name} is running text, which asks nothing. Give a file with rows.")
    kind = _detect_kind(source.first, task, field) if task.kind == "auto" else task.kind
    idle = find_idle_keys(task, kind)
    if idle:
        raise UserError(f"{field}: {', '.join(idle)} given, but a task of the kind {kind} does not use it. Remove it.")
    make = {"multiple_choice": _choice_question, "continuation": _continuation, "exact_match": _open_question}[kind]
    questions = tuple(make(row, task) for row in islice(source, task.num_samples))
    return QuestionSet(task.name or PurePath(task.source).stem, kind, task, questions)


def _detect_kind(row: Row, task: TaskConfig, field: str) -> str:
    if "choices" in row.fields or task.choices is not None:
        return "multiple_choice"
    if "continuation" in row.fields:
        return "continuation"
    if task.reference is not None or any(name in row.fields for name in REFERENCE_FIELDS):
        return "exact_match"
    raise UserError(
        f"{field}: {row.location} is no question; its fields are {', '.join(map(str, row.fields)) or 'none'}. Expected "
        "query, choices and gold (multiple choice), context and continuation, or question and answer (exact match)."
    )


def _choice_question(row: Row, task: TaskConfig) -> Question:
    choices = task.choices if task.choices is not None else _field(row, ("choices",))
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise _wrong(row, "choices", choices, "a list of 2 or more texts that are not empty")
    name = _first_present(row, GOLD_FIELDS)
    gold = row.fields[name]
    if isinstance(gold, str) and gold.strip().isdecimal():
        gold = int(gold)
    elif isinstance(gold, str) and len(gold.strip()) == 1 and gold.strip().upper() in LETTERS:
        gold = LETTERS.index(gold.strip().upper())
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise _wrong(row, name, row.fields[name], f"the number of a choice, 0 to {len(choices) - 1}, or its letter")
    return Question(_prompt(row, task), tuple(choices), gold, "", row.location)


def _continuation(row: Row, task: TaskConfig) -> Question:
    text = _text(row, ("continuation",))
    if not text.strip():
        raise _wrong(row, "continuation", text, "text that is not empty")
    return Question(_prompt(row, task), (text,), 0, "", row.location)


def _open_question(row: Row, task: TaskConfig) -> Question:
    reference = (
        str(_value(row, REFERENCE_FIELDS)) if task.reference is None else _filled(row, task.reference, "reference")
    )
    if not reference.strip():
        raise UserError(f"{row.location}: the right answer is empty. Fill it in or remove the row.")
    return Question(_prompt(row, task), (), 0, reference, row.location)


def _prompt(row: Row, task: TaskConfig) -> str:
    prompt = _text(row, PROMPT_FIELDS) if task.prompt is None else _filled(row, task.prompt, "prompt")
    if not prompt.strip():
        raise UserError(f"{row.location}: the question is empty. Fill it in or remove the row.")
    return prompt


def _filled(row: Row, template: str, name: str) -> str:
    try:
        return template.format_map(row.fields)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{row.location}: the task's {name} {template!r} does not fit: {type(error).__name__}: {error}. The fields "
            f"there are {', '.join(map(str, row.fields))}; a brace that is meant as such is doubled."
        ) from None


def _text(row: Row, names: tuple[str, ...]) -> str:
    value = _field(row, names)
    if not isinstance(value, str):
        raise _wrong(row, _first_present(row, names), value, "text")
    return value


def _value(row: Row, names: tuple[str, ...]) -> object:
    """Text or a number."""
    value = _field(row, names)
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise _wrong(row, _first_present(row, names), value, "text or a number")
    return value


def _field(row: Row, names: tuple[str, ...]) -> object:
    value: object = row.fields[_first_present(row, names)]
    return value


def _first_present(row: Row, names: tuple[str, ...]) -> str:
    for name in names:
        if name in row.fields:
            return name
    wanted = names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    raise UserError(
        f"{row.location}: a field is missing: {wanted}; the fields there are {', '.join(map(str, row.fields))}. Add "
        "it, or give the task a prompt or a reference of its own."
    )


def _wrong(row: Row, name: str, value: object, expected: str) -> UserError:
    shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:37]}..."
    return UserError(f'{row.location}: field "{name}" is {shown}, expected {expected}.')
