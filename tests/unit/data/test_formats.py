"""Detection by the first row, conversion of each format, and the error for every way a row can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_ds.config.errors import UserError
from sparse_ds.data.formats import FORMATS, choose_format
from sparse_ds.data.reading import Row
from sparse_ds.data.samples import Conversation, PromptCompletion, Sample, Text
from sparse_ds.data.sources import open_source

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def convert(format_name: str, fields: dict[str, Any]) -> Sample:
    return FORMATS[format_name].to_sample(Row(fields, "rows.jsonl, line 7"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"instruction": "a", "input": "", "output": "b", "text": "whole"}, "alpaca"),
        ({"prompt": "a", "completion": "b", "id": 3}, "prompt_completion"),
        ({"prompt": "a", "response": "b"}, "prompt_completion"),
        ({"question": "a", "answer": "b"}, "prompt_completion"),
        ({"instruction": "a", "context": "", "response": "b", "category": "c"}, "alpaca"),
        ({"messages": [USER, ASSISTANT], "prompt": "a"}, "messages"),
        ({"conversations": [], "id": "a"}, "sharegpt"),
        ({"text": "a", "label": 1}, "text"),
    ],
)
def test_detection(write_jsonl: Callable[..., Path], row: dict, expected: str) -> None:
    source = open_source(write_jsonl(row), field="data.train", split="train")
    assert choose_format(source, "auto", "data.train").name == expected


def test_detection_of_running_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    source = open_source(tmp_path / "a.txt", field="data.train", split="train")
    assert choose_format(source, "auto", "data.train").name == "text"
    with pytest.raises(UserError, match=r"data\.format is 'alpaca', but data\.train is a \.txt file"):
        choose_format(source, "alpaca", "data.train")


@pytest.mark.parametrize(
    ("row", "data_format", "message"),
    [
        (
            {"query": "a", "gold": "b"},
            "auto",
            r"no known format fits .*line 1; its fields are query, gold\..*"
            r"alpaca \(instruction, output\); prompt_completion \(prompt, completion\); messages \(messages\); "
            r"sharegpt \(conversations\); text \(text\)",
        ),
        ({}, "auto", r"its fields are none"),
        (
            {"prompt": "a", "completion": "b", "messages": []},
            "auto",
            r"fits the formats prompt_completion and messages",
        ),
        ({"text": "a"}, "alpacca", r"data\.format is 'alpacca', expected one of auto, alpaca, prompt_completion"),
    ],
)
def test_no_choice(write_jsonl: Callable[..., Path], row: dict, data_format: str, message: str) -> None:
    source = open_source(write_jsonl(row), field="data.train", split="train")
    with pytest.raises(UserError, match=message):
        choose_format(source, data_format, "data.train")


HEAD = "Below is an instruction that describes a task"


@pytest.mark.parametrize("without", [{}, {"input": ""}, {"input": " \n"}, {"input": None}])
def test_alpaca_without_input(without: dict) -> None:
    sample = convert("alpaca", {"instruction": "Add {x}.", "output": " 3 ", **without})
    assert sample == PromptCompletion(
        f"{HEAD}. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {x}.\n\n### Response:\n",
        " 3 ",
        "rows.jsonl, line 7",
    )


def test_alpaca_with_input() -> None:
    sample = convert("alpaca", {"instruction": "Add.", "input": "{1} 2", "output": "3"})
    assert isinstance(sample, PromptCompletion)
    assert sample.prompt == (
        f"{HEAD}, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n{1} 2\n\n### Response:\n"
    )


def test_prompt_may_be_empty() -> None:
    sample = convert("prompt_completion", {"prompt": "", "completion": "x"})
    assert sample == PromptCompletion("", "x", "rows.jsonl, line 7")


def test_text() -> None:
    assert convert("text", {"text": "a\n"}) == Text("a\n", "rows.jsonl, line 7")


def test_conversation_ends_with_its_last_assistant_turn() -> None:
    turns = [{"role": "system", "content": ""}, USER, {**ASSISTANT, "id": 3}, USER]
    sample = convert("messages", {"messages": turns})
    assert sample == Conversation((turns[0], USER, ASSISTANT), "rows.jsonl, line 7")


@pytest.mark.parametrize(
    ("format_name", "fields", "message"),
    [
        ("alpaca", {"instruction": "a"}, r'"output" is missing; the fields there are instruction'),
        ("alpaca", {"output": "a"}, r'"instruction" is missing'),
        ("alpaca", {"instruction": 5, "output": "a"}, r'"instruction" is int \(5\), expected text'),
        (
            "alpaca",
            {"instruction": "a", "input": ["x"], "output": "a"},
            r'"input" is list \(\[\'x\'\]\), expected text',
        ),
        ("alpaca", {"instruction": "a", "output": ""}, r'"output" is empty, so there is nothing to learn'),
        ("alpaca", {"instruction": "a", "output": None}, r'"output" is null, expected text'),
        ("prompt_completion", {"prompt": "a"}, r'"completion" is missing.*set data\.format'),
        ("prompt_completion", {"completion": "a"}, r'"prompt" is missing'),
        ("prompt_completion", {"prompt": "a", "completion": " \n"}, r'"completion" is empty'),
        ("prompt_completion", {"prompt": None, "completion": "a"}, r'"prompt" is null'),
        ("prompt_completion", {"prompt": "a", "completion": list("x" * 99)}, r"list \(\[.{36}\.\.\.\)"),
        ("text", {"text": " "}, r'"text" is empty'),
        ("text", {"txt": "a"}, r'"text" is missing; the fields there are txt'),
        ("text", {}, r"the fields there are none"),
        ("messages", {"messages": "Hi"}, r'"messages" is str \(\'Hi\'\), expected a list of'),
        ("messages", {"messages": []}, r'"messages" has no turn of the role assistant'),
        ("messages", {"messages": [USER]}, r'"messages" has no turn of the role assistant'),
        ("messages", {"messages": [ASSISTANT]}, r"starts with a turn of the role assistant"),
        ("messages", {"messages": [USER, "Hello"]}, r'"messages\[1\]" is str'),
        ("messages", {"messages": [{"role": "user"}, ASSISTANT]}, r'"messages\[0\]\.content" is missing'),
        (
            "messages",
            {"messages": [{"from": "user", "content": "a"}]},
            r'"messages\[0\]\.role" is missing.* from, content',
        ),
        ("messages", {"messages": [{**USER, "role": "asistant"}]}, r"\.role\" is 'asistant', expected one of system"),
        ("messages", {"messages": [{**USER, "content": ["a"]}]}, r'"messages\[0\]\.content" is list'),
        ("messages", {"messages": [USER, {**ASSISTANT, "content": ""}]}, r'"messages\[1\]\.content" is empty'),
    ],
)
def test_wrong_rows(format_name: str, fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl, line 7: field .*" + message):
        convert(format_name, fields)
