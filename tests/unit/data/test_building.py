"""The entry points: what a bundle holds, what is counted, what is said, and errors before any training."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sparse_ds.config.errors import UserError
from sparse_ds.config.schema import DataConfig
from sparse_ds.data import build_dataset, build_datasets

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
Writer = Callable[..., Path]


def settings(train: Path, eval: Path | None = None, **others: Any) -> DataConfig:
    values = {"sequence_length": 64, **others}
    return DataConfig(train=str(train), eval=None if eval is None else str(eval), **values)


def rows(*completions: str) -> list[dict]:
    return [{"prompt": "Q", "completion": completion} for completion in completions]


def test_bundle(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast) -> None:
    train = write_jsonl(*rows("xy", "z"))
    held_out = write_jsonl(*rows("one", "two", "three"), name="held_out.jsonl")
    bundle = build_datasets(settings(train, held_out, num_eval_samples=2), tokenizer, num_sample_prompts=1)
    assert bundle.train.column_names == bundle.eval.column_names == ["input_ids", "labels"]
    assert (len(bundle.train), len(bundle.eval)) == (2, 2)
    assert (bundle.train_data.num_tokens, bundle.num_trained_tokens) == (9, 5)
    assert bundle.format_name == "prompt_completion"
    assert [(one.text, one.reference) for one in bundle.sample_prompts] == [("Q", "one")]
    assert bundle.collator.pad_token_id == tokenizer.eos_token_id
    assert bundle.collator([bundle.train[0], bundle.train[1]])["labels"].tolist() == [
        [-100, -100, 125, 126, 2, -100, -100, -100],
        [-100, -100, 127, 2, -100, -100, -100, -100],
    ]


def test_pad_token_is_used_where_there_is_one(make_tokenizer: MakeTokenizer, write_jsonl: Writer) -> None:
    bundle = build_datasets(settings(write_jsonl(*rows("x"))), make_tokenizer(pad_token="<unk>"))
    assert bundle.collator.pad_token_id == 0


def test_without_held_out_data_prompts_come_from_training(
    write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast
) -> None:
    bundle = build_datasets(settings(write_jsonl(*rows("x", "y", "z"))), tokenizer, num_sample_prompts=2)
    assert bundle.eval is None and bundle.eval_data is None
    assert [one.reference for one in bundle.sample_prompts] == ["x", "y"]


def test_more_samples_than_one_chunk_keep_their_order(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast) -> None:
    data = build_dataset(write_jsonl(*({"text": str(number)} for number in range(2500))), tokenizer)
    assert len(data.dataset) == 2500
    for number in (0, 999, 1000, 1001, 2499):
        assert data.dataset[number]["input_ids"] == [1, *(5 + byte for byte in str(number).encode()), 2]
    assert data.num_tokens == sum(map(len, data.dataset["input_ids"]))


def test_same_bytes_every_time_and_nothing_written(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(*rows("x", "y"))
    first, second = (build_dataset(path, tokenizer).dataset for _ in range(2))
    assert first.to_dict() == second.to_dict()
    assert first.cache_files == []
    assert os.listdir(path.parent) == ["rows.jsonl"]


@pytest.mark.parametrize("max_samples", [1, 2, 3, 9])
def test_max_samples(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast, max_samples: int) -> None:
    data = build_dataset(write_jsonl(*rows("x", "y", "z")), tokenizer, max_samples=max_samples)
    assert len(data.dataset) == min(3, max_samples)


def test_running_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "story.txt").write_text("x" * 300)
    data = build_dataset(tmp_path / "story.txt", tokenizer, sequence_length=100, num_sample_prompts=1)
    assert list(map(len, data.dataset["input_ids"])) == [100, 100, 100]
    assert data.num_trained_tokens == 297
    assert len(data.sample_prompts[0].input_ids) == 32
    assert data.sample_prompts[0].reference == "x" * 64
    assert len(build_dataset(tmp_path / "story.txt", tokenizer, sequence_length=100, max_samples=2).dataset) == 2


def test_truncated_and_dropped_samples_are_counted_and_said_once(
    write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    long_prompt = {"prompt": "Q" * 10, "completion": "x"}
    path = write_jsonl(long_prompt, *rows("x", "x" * 20), long_prompt)
    with caplog.at_level(logging.INFO, "sparse_ds.data"):
        data = build_dataset(path, tokenizer, sequence_length=8, num_sample_prompts=1, show_progress=True)
    assert (len(data.dataset), data.num_truncated, data.num_dropped) == (2, 1, 2)
    assert data.dropped_rows == (0, 3)
    assert [data.row_of(sample) for sample in range(2)] == [1, 2]
    assert data.sample_prompts[0].reference == "x"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert "2 samples, format prompt_completion (detected), 12 tokens, 8 of them trained (67%)" in said[0]
    assert said[1] == "data.train: 1 of 2 samples are longer than data.sequence_length = 8 tokens and lose their end"
    assert said[2] == (
        f"data.train: 2 of 4 rows are left out. The first: {path}, line 1: nothing to learn is left within "
        "data.sequence_length = 8 tokens. Raise it, or shorten the prompt."
    )


def test_other_ranks_are_silent(
    write_jsonl: Writer,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level(logging.DEBUG):
        build_dataset(write_jsonl(*rows("x" * 100, "y")), tokenizer, sequence_length=8)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_no_usable_sample(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl({"prompt": "Q" * 10, "completion": "x"})
    with pytest.raises(UserError, match=r"data\.train: no usable sample in .*: 1 of 1 rows are left out\. .* Raise it"):
        build_dataset(path, tokenizer, sequence_length=8)


def test_bad_row_far_down_names_its_line(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(*rows("x") * 1500, {"prompt": "Q"})
    with pytest.raises(UserError, match=r'rows\.jsonl, line 1501: field "completion" is missing'):
        build_dataset(path, tokenizer)


def test_missing_held_out_file_ends_it_before_training_data_is_read(
    write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    train = write_jsonl(*rows("x"), {"prompt": "broken"})
    with pytest.raises(UserError, match=r"data\.eval: no such file"):
        build_datasets(settings(train, tmp_path / "none.jsonl"), tokenizer)


def test_messages_need_a_chat_template(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    with pytest.raises(UserError, match=r"data\.train: conversations need a chat template"):
        build_dataset(path, tokenizer)


def test_max_samples_below_one(write_jsonl: Writer, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"the number of samples to read for data\.train is 0"):
        build_dataset(write_jsonl(*rows("x")), tokenizer, max_samples=0)
