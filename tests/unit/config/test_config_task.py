"""`model.task` and the keys that belong to one task only."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sparse_ds.config import UserError, parse_config

VALID: dict[str, Any] = {"optimizer": {"learning_rate": 0.001}, "train": {"output_dir": "runs/x"}}
CLASSIFIER = {"task": "sequence_classification"}
WORDS = {**CLASSIFIER, "head_initialization": "label_words"}


def parse(model: dict[str, Any], data: dict[str, Any] | None = None) -> Any:
    return parse_config({**VALID, "model": model, "data": data or {}})


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"head_initialization": "normal"}, {}, r"model\.head_initialization: given, but only model\.task sequence_cl"),
        ({"label_words": ["a", "b"]}, {}, r"model\.label_words: given, but only model\.task sequence_classification"),
        (
            {},
            {"instruction": "{text}?"},
            r"data\.instruction: given, but only model\.task sequence_classification uses",
        ),
        (CLASSIFIER, {"instruction": "text?"}, r"data\.instruction: got 'text\?', expected a text with \{text\} in it"),
        ({}, {"labels": ["a", "b"]}, r"data\.labels: given, but only model\.task sequence_classification uses it"),
        (
            {},
            {"format": "classification"},
            r"data\.format: got classification, expected another one with model\.task c",
        ),
        (CLASSIFIER, {"format": "text"}, r"data\.format: got text, expected auto or classification with model\.task"),
        (WORDS, {}, r"model\.label_words: missing, and model\.head_initialization label_words needs a word per label"),
        ({**CLASSIFIER, "label_words": ["a", "b"]}, {}, r"label_words: given, but only model\.head_initialization lab"),
        (
            {**WORDS, "label_words": ["a", "b"]},
            {"labels": ["x", "y", "z"]},
            r"got 2 words for the 3 labels of data\.la",
        ),
        (CLASSIFIER, {"packing": True}, r"data\.packing: got true, expected false with model\.task sequence_classific"),
        (CLASSIFIER, {"labels": ["x", "y", "x"]}, r"data\.labels: holds 'x' more than once"),
        (CLASSIFIER, {"labels": ["x"]}, r"data\.labels: got \[\"x\"\] \(list\), expected"),
        (
            {"task": "classification"},
            {},
            r"model\.task: got \"classification\" \(text\), expected one of causal_lm, seq",
        ),
    ],
)
def test_conflicts(model: dict[str, Any], data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(model, data)
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ({}, {}),
        ({"label_words": None}, {"labels": None}),
        (CLASSIFIER, {"labels": ["y", "x"], "format": "classification"}),
        ({**WORDS, "label_words": ["no", "yes"]}, {"instruction": "Is it good? {text}"}),
    ],
)
def test_what_a_run_records_can_be_run_again(model: dict[str, Any], data: dict[str, Any]) -> None:
    config = parse(model, data)
    recorded = config.to_dict()
    assert parse_config(recorded).to_dict() == recorded
    assert ("head_initialization" in recorded["model"]) == (config.model.task == "sequence_classification")
