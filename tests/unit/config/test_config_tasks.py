"""`data.tasks`: what an entry may be, and what is said of a wrong one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sparse_ds.config import RunConfig, UserError, load_config, parse_config
from sparse_ds.config.tasks import TaskConfig, find_idle_keys


def load(tasks: list[Any], *settings: str) -> RunConfig:
    return load_config("zero3_sft_ma", [f"data.tasks={json.dumps(tasks)}", *settings])


def test_a_text_is_the_source_of_a_task() -> None:
    config = load(["a.jsonl", {"source": "b.jsonl", "max_new_tokens": 3}])
    assert config.data.tasks == [TaskConfig(source="a.jsonl"), TaskConfig(source="b.jsonl", max_new_tokens=3)]
    assert parse_config(config.to_dict()) == config
    assert load_config("zero3_sft_ma").data.tasks == []


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ({"source": "a", "kind": "quiz"}, "data.tasks[0].kind: got \"quiz\" (text). Input should be 'auto', "),
        ({"kind": "auto"}, "data.tasks[0].source: missing. "),
        ({"source": "a", "max_new_tokens": 0}, "data.tasks[0].max_new_tokens: got 0 (integer). "),
        ({"source": "a", "promt": "x"}, "data.tasks[0].promt: unknown key."),
        (
            {"source": "a", "answer_pattern": "("},
            'data.tasks[0].answer_pattern: got "(" (text). no regular expression: missing ), unterminated',
        ),
        (5, "data.tasks: got [5] (list), expected a list of texts or sections ({...}). Questions that "),
    ],
)
def test_a_wrong_entry_is_named(task: Any, expected: str) -> None:
    with pytest.raises(UserError) as raised:
        load([task])
    assert expected in str(raised.value)


def test_a_classifier_answers_no_questions() -> None:
    with pytest.raises(UserError, match=r"data\.tasks: given, but only model\.task causal_lm answers questions"):
        load(["a.jsonl"], "model.task=sequence_classification")


def test_settings_that_a_kind_does_not_use() -> None:
    task = TaskConfig(source="a", choices=["x", "y"], stop=["."], max_new_tokens=64)
    assert find_idle_keys(task, "multiple_choice") == ["stop"]
    assert find_idle_keys(task, "exact_match") == ["choices"]
    assert find_idle_keys(task, "continuation") == ["stop", "choices"]
