"""Rows that cannot be used: the first ends it, or all of them are left out, counted, and the first is named."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from sparse_ds.config.errors import UserError
from sparse_ds.config.schema import DataConfig
from sparse_ds.data import build_dataset, build_datasets

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
Writer = Callable[..., Path]
GOOD = {"prompt": "Q", "completion": "x"}
USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "x"}


def jsonl(*lines: bytes | dict) -> bytes:
    return b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)


BAD: dict[str, tuple[str, bytes, str]] = {
    "broken JSON": ("rows.jsonl", jsonl(GOOD, b'{"prompt": ', GOOD), r"rows\.jsonl, line 2: broken JSON"),
    "deep JSON": ("rows.jsonl", jsonl(GOOD, b"[" * 100_000, GOOD), r"rows\.jsonl, line 2: broken JSON: .*recursion"),
    "a huge number": ("rows.jsonl", jsonl(GOOD, b"9" * 5000, GOOD), r"rows\.jsonl, line 2: broken JSON: .*digits"),
    "no object": ("rows.jsonl", jsonl(GOOD, b"[]", GOOD), r"rows\.jsonl, line 2: a sample is an array"),
    "not UTF-8": ("rows.jsonl", jsonl(GOOD, b'{"prompt": "\xe4"}', GOOD), r"line 2: not UTF-8 \(byte 0xe4\)"),
    "half a surrogate pair": (
        "rows.jsonl",
        jsonl(GOOD, b'{"prompt": "a\\ud83d", "completion": "b"}', GOOD),
        r'line 2: field "prompt" holds half of a surrogate pair \(U\+D83D, at character 2\)',
    ),
    "missing field": ("rows.jsonl", jsonl(GOOD, {"prompt": "Q"}, GOOD), r'line 2: field "completion" is missing'),
    "wrong type": ("rows.jsonl", jsonl(GOOD, {**GOOD, "prompt": 5}, GOOD), r'line 2: field "prompt" is int \(5\)'),
    "nothing to learn": (
        "rows.jsonl",
        jsonl(GOOD, {**GOOD, "completion": " "}, GOOD),
        r"nothing to learn\. Fill it in",
    ),
    "an element of an array": ("rows.json", json.dumps([GOOD, 5, GOOD], indent=0).encode(), r"a sample is a number"),
    "a record with a field too many": (
        "rows.csv",
        b"prompt,completion\nQ,x\nQ,x,y\nQ,x\n",
        r"rows\.csv, line 3: 3 fields, expected 2",
    ),
    "a record with open quotes": (
        "rows.csv",
        b'prompt,completion\nQ,x\nQ,"x"y\nQ,x\n',
        r"rows\.csv, line 3: broken record",
    ),
    "a record that is not UTF-8": (
        "rows.csv",
        b"prompt,completion\nQ,x\nQ,caf\xe9\nQ,x\n",
        r"rows\.csv, line 3: not UTF-8 \(byte 0xe9\)",
    ),
}


@pytest.mark.parametrize(("name", "data", "message"), BAD.values(), ids=BAD.keys())
def test_error_or_skip(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    name: str,
    data: bytes,
    message: str,
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=message + r".*\(data\.on_bad_row skip leaves such rows out\.\)$"):
        build_dataset(path, tokenizer)
    with caplog.at_level(logging.WARNING, "sparse_ds.data"):
        read = build_dataset(path, tokenizer, on_bad_row="skip", show_progress=True)
    assert [sample["input_ids"] for sample in read.dataset] == [[1, 86, 125, 2]] * 2
    assert (read.num_dropped, read.dropped_rows, [read.row_of(0), read.row_of(1)]) == (1, (1,), [0, 2])
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("data.train: 1 of 3 rows are left out. The first: ")


def test_the_first_bad_row_is_named_whatever_was_found_first(
    make_tokenizer: MakeTokenizer, write_jsonl: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows are converted a thousand at a time and then tokenized: line 4 is found before line 2."""
    template = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no!') }}{% endif %}{{ m.content }}"
    tokenizer = make_tokenizer(chat_template=template + "{{ eos_token }}{% endfor %}")
    good = {"messages": [USER, ASSISTANT]}
    path = write_jsonl(good, {"messages": [{**USER, "content": "no"}, ASSISTANT]}, good, {"messages": []}, good)
    with caplog.at_level(logging.WARNING, "sparse_ds.data"):
        data = build_dataset(path, tokenizer, on_bad_row="skip", show_progress=True)
    assert data.dropped_rows == (1, 3)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "2 of 5 rows are left out" in warning
    assert warning.endswith("rows.jsonl, line 2: the chat template refuses the conversation: no!")


@pytest.mark.parametrize("failure", ["{{ messages[9].content }}", "{{ 1 / 0 }}", "{{ 'a' + 5 }}", "{{ none.x.y }}"])
def test_templates_fail_in_many_ways(make_tokenizer: MakeTokenizer, write_jsonl: Writer, failure: str) -> None:
    path = write_jsonl({"messages": [USER, ASSISTANT]})
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: the chat template refuses the conversation: "):
        build_dataset(path, make_tokenizer(chat_template=failure))


def test_long_samples_are_cut_or_bad(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(GOOD, {**GOOD, "completion": "x" * 9})
    assert build_dataset(path, tokenizer, sequence_length=8).num_truncated == 1
    with pytest.raises(UserError, match=r"line 2: the sample is longer than data\.sequence_length = 8 tokens"):
        build_dataset(path, tokenizer, sequence_length=8, truncate=False)
    data = build_dataset(path, tokenizer, sequence_length=8, truncate=False, on_bad_row="skip")
    assert (len(data.dataset), data.num_truncated, data.dropped_rows) == (1, 0, (1,))


def test_a_sample_of_one_token_holds_nothing_to_learn(make_tokenizer: MakeTokenizer, write_jsonl: Writer) -> None:
    tokenizer = make_tokenizer(template=None)
    path = write_jsonl({"text": "</s>"}, {"text": "ok"})
    with pytest.raises(UserError, match=r"line 1: there is nothing to learn in the sample"):
        build_dataset(path, tokenizer)
    assert len(build_dataset(path, tokenizer, on_bad_row="skip").dataset) == 1


def test_all_rows_are_bad(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl({"prompt": "Q", "completion": ""}, {"prompt": 5, "completion": "x"})
    with pytest.raises(UserError, match=r"no usable sample in .*2 of 2 rows are left out\. The first: .*line 1"):
        build_dataset(path, tokenizer, on_bad_row="skip")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.json", b'[{"text": "x"}, {"text": ]'),
        ("rows.csv", b"a,,b\n1,2,3\n"),
        ("rows.parquet", b"no parquet"),
        ("rows.txt", b"caf\xe9"),
    ],
)
def test_what_cannot_be_skipped(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}"):
        build_dataset(tmp_path / name, tokenizer, on_bad_row="skip")


def test_labels(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"text": "a", "label": "yes"},
        {"text": "b", "label": "maybe"},
        {"text": "cc", "label": "no"},
        {"text": "d"},
    ]
    held_out = write_jsonl(*rows[:3], name="held_out.jsonl")
    settings = DataConfig(
        train=str(write_jsonl(*rows)),
        eval=str(held_out),
        labels=["no", "yes"],
        sequence_length=8,
        on_bad_row="skip",
    )
    bundle = build_datasets(settings, tokenizer, task="sequence_classification")
    assert bundle.train_data.dropped_rows == (1, 3)
    assert [bundle.train_data.row_of(sample) for sample in (0, 1)] == [0, 2]
    assert bundle.train["label"][:] == bundle.eval["label"][:] == [1, 0]
    strict = settings.model_copy(update={"on_bad_row": "error"})
    with pytest.raises(UserError, match=r'rows\.jsonl, line 2: field "label" is \'maybe\', expected one of'):
        build_datasets(strict, tokenizer, task="sequence_classification")
    short = settings.model_copy(update={"sequence_length": 2, "truncate": False})
    assert len(build_datasets(short, tokenizer, task="sequence_classification").train) == 1
