"""Labeled texts: which fields, which ids, which numbers, and every mistake with its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sparse_ds.config.errors import UserError
from sparse_ds.config.schema import DataConfig
from sparse_ds.data import DataBundle, build_datasets

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
Writer = Callable[..., Path]
BOS, EOS = 1, 2


def build(tokenizer: PreTrainedTokenizerFast, train: Path, eval: Path | None = None, **others: Any) -> DataBundle:
    values = {"sequence_length": 64, **others}
    settings = DataConfig(train=str(train), eval=None if eval is None else str(eval), **values)
    return build_datasets(settings, tokenizer, task="sequence_classification")


def ids_of(text: str) -> list[int]:
    return [BOS, *(5 + byte for byte in text.encode())]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"text": "x"}, "x"),
        ({"sentence": "x"}, "x"),
        ({"text": "x", "text_pair": "y"}, "x\ny"),
        ({"text": "x", "text_pair": None}, "x"),
        ({"sentence1": "x", "sentence2": "y"}, "x\ny"),
        ({"premise": "x", "hypothesis": "y"}, "x\ny"),
        ({"question1": "x", "question2": "y"}, "x\ny"),
        ({"question": "x", "sentence": "y"}, "x\ny"),
    ],
)
def test_fields(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast, fields: dict[str, Any], text: str) -> None:
    bundle = build(tokenizer, write_jsonl({**fields, "label": "b"}, {**fields, "label": "a"}))
    assert bundle.train["input_ids"][0] == ids_of(text)
    assert bundle.train["label"][:] == [1, 0] and bundle.train_data.labels == ("a", "b")


def test_a_bundle(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast) -> None:
    train = write_jsonl({"text": "xyz", "label": 10}, {"text": "z", "label": 9}, {"text": "q", "label": "10"})
    held_out = write_jsonl(*[{"text": "w", "label": 10}] * 3, name="held_out.jsonl")
    bundle = build(tokenizer, train, held_out, num_eval_samples=2)
    assert bundle.train_data.labels == bundle.eval_data.labels == ("9", "10"), "numbers are sorted as numbers"
    assert bundle.train["label"][:] == [1, 0, 1]
    assert len(bundle.eval) == 2 and bundle.eval["label"][:] == [1, 1]
    assert (bundle.format_name, bundle.num_trained_tokens, bundle.sample_prompts) == ("classification", 3, [])
    batch = bundle.collator([bundle.train[0], bundle.train[1]])
    assert batch["input_ids"].tolist() == [[*ids_of("xyz"), *[EOS] * 4], [*ids_of("z"), *[EOS] * 6]]
    assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 2 + [0] * 6]
    assert batch["labels"].tolist() == [1, 0]
    assert "3 samples of 2 labels, format classification (detected), 8 tokens" in bundle.train_data.describe()


def test_the_order_of_given_labels_counts(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast) -> None:
    train = write_jsonl({"text": "x", "label": "a"}, {"text": "y", "label": "b"})
    bundle = build(tokenizer, train, labels=["b", "c", "a"])
    assert bundle.train["label"][:] == [2, 0] and bundle.train_data.labels == ("b", "c", "a")


def test_long_texts_lose_their_end(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast) -> None:
    bundle = build(tokenizer, write_jsonl({"text": "x" * 9, "label": 0}, {"text": "y", "label": 1}), sequence_length=4)
    assert bundle.train["input_ids"][0] == ids_of("xxx") and bundle.train_data.num_truncated == 1


@pytest.mark.parametrize("pad_token", [None, "<unk>"], ids=["EOS pads", "another token pads"])
def test_what_pads_is_taken_from_the_end(
    write_jsonl: Writer, make_tokenizer: MakeTokenizer, pad_token: str | None
) -> None:
    """Nobody could tell it from padding; in the middle it stays."""
    tokenizer = make_tokenizer(**({} if pad_token is None else {"pad_token": pad_token}))
    train = write_jsonl({"text": "x</s>y</s></s>", "label": 0}, {"text": "</s>", "label": 1})
    first, second = build(tokenizer, train).train["input_ids"][:]
    if pad_token is None:
        assert (first, second) == ([BOS, 125, EOS, 126], [BOS])
    else:
        assert (first, second) == ([BOS, 125, EOS, 126, EOS, EOS], [BOS, EOS])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r'line 2: field "label" is missing; the fields there are text'),
        ({"text": "x", "label": None}, r'line 2: field "label" is null, expected an integer or text'),
        ({"text": "x", "label": 0.5}, r'line 2: field "label" is float \(0.5\)'),
        ({"text": "x", "label": True}, r'line 2: field "label" is bool'),
        ({"text": "x", "label": ""}, r'line 2: field "label" is str'),
        ({"text": " ", "label": 1}, r'line 2: field "text" is empty'),
        ({"sentence1": "x", "label": 1}, r'line 2: field "sentence2" is missing'),
        ({"premise": "x", "label": 1}, r'line 2: field "hypothesis" is missing'),
        ({"sentence1": "x", "sentence2": None, "label": 1}, r'line 2: field "sentence2" is null'),
        ({"question": "x", "label": 1}, r"line 2: no text to classify; the fields there are question, label"),
    ],
)
def test_a_bad_row_is_named(
    write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(tokenizer, write_jsonl({"text": "x", "label": 0}, row))


def test_labels_that_do_not_fit(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    good = write_jsonl({"text": "x", "label": "a"}, {"text": "y", "label": "b"})
    other = write_jsonl({"text": "x", "label": "a"}, {"text": "y", "label": "c"}, name="other.jsonl")
    with pytest.raises(UserError, match=r"line 2: field \"label\" is 'c', expected one of 'a', 'b' \(data.labels\)"):
        build(tokenizer, other, labels=["a", "b"])
    with pytest.raises(UserError, match=r"other.jsonl, line 2: .* the labels of data.train\)"):
        build(tokenizer, good, other)
    with pytest.raises(UserError, match="have the label 'a'; expected at least 2 labels"):
        build(tokenizer, write_jsonl({"text": "x", "label": "a"}, name="one.jsonl"))
    text = tmp_path / "text.txt"
    text.write_text("running text")
    with pytest.raises(UserError, match=r"data.train: .* is running text, which has no labels"):
        build(tokenizer, text)


def test_a_language_model_is_told_of_the_task(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = DataConfig(train=str(write_jsonl({"sentence": "x", "label": 1})), eval=None, sequence_length=8)
    with pytest.raises(UserError, match=r"set model.task to sequence_classification"):
        build_datasets(settings, tokenizer)
