"""Rows to questions, and what is said of rows that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparse_ds.config.errors import UserError
from sparse_ds.config.tasks import TaskConfig
from sparse_ds.evaluation.questions import QuestionSet, read_task, read_tasks


def save(folder: Path, *rows: Any, name: str = "quiz.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(folder: Path, *rows: Any, **settings: Any) -> QuestionSet:
    return read_task(TaskConfig(source=save(folder, *rows), **settings), "data.tasks")


CHOICE = {"query": "Is it?", "choices": ["no", "yes"], "gold": 1}
OPEN = {"question": "1 + 1?", "answer": "2"}


def test_kinds_are_told_by_the_fields(tmp_path: Path) -> None:
    choice = read(tmp_path, CHOICE)
    assert (choice.kind, choice.name) == ("multiple_choice", "quiz")
    (question,) = choice.questions
    assert (question.prompt, question.choices, question.gold) == ("Is it?", ("no", "yes"), 1)
    assert question.location.endswith("quiz.jsonl, line 1")
    word = read(tmp_path, {"context": "Once upon a", "continuation": "time"})
    assert (word.kind, word.questions[0].choices, word.questions[0].gold) == ("continuation", ("time",), 0)
    sum_ = read(tmp_path, OPEN)
    assert (sum_.kind, sum_.questions[0].prompt, sum_.questions[0].reference) == ("exact_match", "1 + 1?", "2")
    assert read(tmp_path, {"input": "a", "target": 2.5}).questions[0].reference == "2.5"
    # Fields that fit two kinds: the task says which.
    assert read(tmp_path, {**CHOICE, "answer": "1"}, kind="exact_match").kind == "exact_match"


def test_gold_is_a_number_or_a_letter(tmp_path: Path) -> None:
    rows = [{**CHOICE, "gold": gold} for gold in (1, "1", "B", " b ")]
    assert [each.gold for each in read(tmp_path, *rows).questions] == [1, 1, 1, 1]
    mmlu = {"question": "Which?", "choices": ["u", "v"], "answer": "A"}
    assert read(tmp_path, mmlu).questions[0].gold == 0


def test_prompt_choices_and_reference_of_the_task(tmp_path: Path) -> None:
    row = {"question": "Which?", "choices": ["u", "v"], "answer": "B"}
    lettered = read(tmp_path, row, prompt="{question} A: {choices[0]} {{x}}", choices=["A", "B"], name="letters")
    assert lettered.name == "letters"
    assert (lettered.questions[0].prompt, lettered.questions[0].choices) == ("Which? A: u {x}", ("A", "B"))
    sums = read(tmp_path, {"a": 1, "sum": 3}, prompt="{a} + 2 =", reference="{sum}.0")
    assert (sums.questions[0].prompt, sums.questions[0].reference) == ("1 + 2 =", "3.0")


def test_the_first_rows_only(tmp_path: Path) -> None:
    # The broken third row is never read.
    assert len(read(tmp_path, CHOICE, CHOICE, {"query": 3}, num_samples=2).questions) == 2


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        ({"a": 1}, {}, "line 1 is no question; its fields are a. Expected query, choices and gold"),
        ({**CHOICE, "gold": 2}, {}, 'line 1: field "gold" is 2, expected the number of a choice, 0 to 1, or its'),
        ({**CHOICE, "gold": True}, {}, 'field "gold" is True'),
        ({**CHOICE, "gold": "Z"}, {}, "field \"gold\" is 'Z'"),
        ({**CHOICE, "choices": ["a"]}, {}, "field \"choices\" is ['a'], expected a list of 2 or more texts"),
        ({**CHOICE, "choices": ["a", ""]}, {}, 'field "choices"'),
        ({"query": "x", "choices": ["a", "b"]}, {}, "a field is missing: one of gold, answer, label; the fields"),
        ({"choices": ["a", "b"], "gold": 0}, {}, "a field is missing: one of query, question, prompt, input, context"),
        ({**CHOICE, "query": 3}, {}, 'field "query" is 3, expected text.'),
        ({**CHOICE, "query": "  "}, {}, "line 1: the question is empty"),
        ({**OPEN, "answer": " "}, {}, "line 1: the right answer is empty"),
        ({**OPEN, "answer": ["2"]}, {}, "field \"answer\" is ['2'], expected text or a number."),
        (CHOICE, {"prompt": "{qery}"}, "the task's prompt '{qery}' does not fit: KeyError: 'qery'. The fields there"),
        (CHOICE, {"prompt": "{choices[7]}"}, "does not fit: IndexError"),
        (CHOICE, {"prompt": "{query"}, "does not fit: ValueError"),
        (CHOICE, {"answer_pattern": "x"}, "answer_pattern given, but a task of the kind multiple_choice does not"),
        (OPEN, {"choices": ["a", "b"], "kind": "exact_match"}, "choices given, but a task of the kind exact_match"),
        ({"context": "a", "continuation": ""}, {}, "field \"continuation\" is '', expected text that is not empty"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, row: dict[str, Any], settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as raised:
        read(tmp_path, row, **settings)
    assert expected in str(raised.value)


def test_running_text_and_equal_names(tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text("Once.", encoding="utf-8")
    with pytest.raises(UserError, match="is running text, which asks nothing"):
        read_task(TaskConfig(source=str(text)), "data.tasks")
    source = save(tmp_path, CHOICE)
    with pytest.raises(UserError, match="2 tasks are called 'quiz'"):
        read_tasks([TaskConfig(source=source), TaskConfig(source=source)], "data.tasks")


def test_the_digest_is_of_all_that_is_asked(tmp_path: Path) -> None:
    first = read(tmp_path, CHOICE)
    assert first.digest() == read(tmp_path, CHOICE).digest()
    assert first.digest() != read(tmp_path, {**CHOICE, "gold": 0}).digest()
    assert first.digest() != read(tmp_path, CHOICE, prompt="{query}!").digest()
