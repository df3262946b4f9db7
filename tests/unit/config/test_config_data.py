"""The `data` section: mixtures, streams, templates, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest

from sparse_ds.config import RunConfig, UserError, parse_config

VALID = {"optimizer": {"learning_rate": 0.001}, "train": {"output_dir": "x"}}
PARTS = '[{"source": "a", "weight": 0.5}, {"source": "b", "num_samples": 3, "format": "text"}, {"source": "c"}]'


def make(*overrides: str, **sections: Any) -> RunConfig:
    return parse_config({**VALID, **sections}, overrides)


def test_a_mixture_from_the_command_line_and_back() -> None:
    config = make(f"data.train={PARTS}")
    assert not isinstance(config.data.train, str)
    assert [(part.source, part.weight, part.num_samples, part.format) for part in config.data.train] == [
        ("a", 0.5, None, None),
        ("b", None, 3, "text"),
        ("c", None, None, None),
    ]
    assert parse_config(config.to_dict()) == config


@pytest.mark.parametrize("text", ["2024", "true", "1e3", "null.jsonl"])
def test_one_source_is_text_whatever_json_would_make_of_it(text: str) -> None:
    assert make(f"data.train={text}").data.train == text


def test_what_a_run_does_not_use_is_not_written_down() -> None:
    assert "shuffle_buffer" not in make().to_dict()["data"]
    streamed = make("data.streaming=true", "train.max_steps=5")
    assert streamed.to_dict()["data"]["shuffle_buffer"] == 10_000
    labeled = make("model.task=sequence_classification")
    assert "template" not in labeled.to_dict()["data"]
    for config in (streamed, labeled):
        assert parse_config(config.to_dict()) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.train=[]"],
            r"data\.train: got \[\] \(list\), expected text .* or a list of \{source, weight, num_samples",
        ),
        (['data.train=[{"weight": 1}]'], r"data\.train: got \[\{\"weight\": 1\}\] \(list\), expected"),
        (['data.train=[{"source": "a", "weight": 0}]'], r"data\.train: got "),
        (['data.train=[{"source": "a", "wieght": 1}]'], r"data\.train: got "),
        (
            ['data.train=[{"source": "a"}, {"source": "b", "weight": 1, "num_samples": 2}]'],
            r"data\.train\[1\]: weight and num_samples are both given",
        ),
        (['data.train=[{"source": "~/a"}]'], r"data\.train\[0\]\.source: got ~/a, expected a path written out"),
        (["data.template=~/a.jinja"], r"data\.template: got ~/a\.jinja, expected a path written out"),
        (["data.streaming=true"], r"train\.max_steps: missing, and data\.streaming needs it"),
        (["data.shuffle_buffer=5"], r"data\.shuffle_buffer: given, but only data\.streaming uses it"),
        (
            ['data.train=[{"source": "a", "num_samples": 2}]', "data.streaming=true", "train.max_steps=5"],
            r"data\.train\[0\]\.num_samples: given, but with data\.streaming only weight is used",
        ),
        (
            ["data.streaming=true", "train.max_steps=5", "model.task=sequence_classification"],
            r"data\.streaming: got true with model\.task sequence_classification",
        ),
        (
            ["data.template=chatml", "model.task=sequence_classification"],
            r"data\.template: given, but model\.task sequence_classification does not use it",
        ),
        (
            ['data.train=[{"source": "a"}]', "model.task=sequence_classification"],
            r"data\.train: got a list, expected one source with model\.task sequence_classification",
        ),
        (["data.on_bad_row=ignore"], r'data\.on_bad_row: got "ignore" .*, expected one of error, skip'),
    ],
)
def test_what_does_not_go_together(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(*overrides)
