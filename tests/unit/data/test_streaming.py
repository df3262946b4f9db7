"""Streamed samples: the same on every rank and after a restart, bad rows and all."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sparse_ds.config.errors import UserError
from sparse_ds.config.schema import DataConfig
from sparse_ds.data import build_datasets
from sparse_ds.data.fingerprint import dataset_fingerprint
from sparse_ds.data.streaming import StreamedData

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
GLOBAL_BATCH = 8
NUM_STEPS = 6


def write(path: Path, num_rows: int, name: str = "r") -> str:
    rows = [{"prompt": "Q", "completion": f"{name}{number}"} for number in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stream(
    tokenizer: PreTrainedTokenizerFast, train: str | list[dict[str, Any]], seed: int = 0, **others: Any
) -> StreamedData:
    values = {"train": train, "eval": None, "streaming": True, "shuffle_buffer": 10, "sequence_length": 64, **others}
    bundle = build_datasets(
        DataConfig.model_validate(values), tokenizer, seed=seed, global_batch_size=GLOBAL_BATCH, num_sample_prompts=2
    )
    assert isinstance(bundle.train_data, StreamedData) and bundle.train is bundle.train_data.dataset
    return bundle.train_data


def answers(tokenizer: PreTrainedTokenizerFast, data: StreamedData, indices: list[int]) -> dict[int, str]:
    learned = {}
    for index in indices:
        sample = data.dataset[index]
        assert len(sample["input_ids"]) == len(sample["labels"])
        learned[index] = tokenizer.decode([label for label in sample["labels"] if label != -100])
    return learned


def indices_of_rank(rank: int, world_size: int, micro_batch: int) -> list[int]:
    """accelerate deals micro batches of consecutive samples to the ranks in turn."""
    everything = range(NUM_STEPS * GLOBAL_BATCH)
    return [index for index in everything if index // micro_batch % world_size == rank]


def test_samples_do_not_depend_on_the_ranks(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train = [{"source": write(tmp_path / "a.jsonl", 9, "a"), "weight": 2}, {"source": write(tmp_path / "b.jsonl", 30)}]
    alone = answers(tokenizer, stream(tokenizer, train), indices_of_rank(0, 1, 2))
    assert len(set(alone.values())) > 20 and {text[0] for text in alone.values()} == {"a", "r"}
    for world_size, micro_batch in ((2, 2), (4, 2), (2, 4), (8, 1)):
        together: dict[int, str] = {}
        for rank in range(world_size):
            together |= answers(tokenizer, stream(tokenizer, train), indices_of_rank(rank, world_size, micro_batch))
        assert dict(sorted(together.items())) == alone


def test_a_later_start_and_a_step_back(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train = write(tmp_path / "a.jsonl", 30)
    everything = list(range(NUM_STEPS * GLOBAL_BATCH))
    whole = answers(tokenizer, stream(tokenizer, train), everything)
    data = stream(tokenizer, train)
    assert answers(tokenizer, data, everything[27:]) == {index: whole[index] for index in everything[27:]}
    assert answers(tokenizer, data, [0, 47, 3]) == {index: whole[index] for index in (0, 47, 3)}
    assert answers(tokenizer, stream(tokenizer, train, seed=1), everything) != whole
    assert len(data.dataset) > 10**9


def test_no_shuffling(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = stream(tokenizer, write(tmp_path / "a.jsonl", 5), shuffle_buffer=1)
    assert list(answers(tokenizer, data, list(range(7))).values()) == [f"r{number % 5}</s>" for number in range(7)]
    assert [prompt.reference for prompt in data.sample_prompts] == ["r0", "r1"]
    assert [data.row_of(index) for index in (0, 6)] == [f"{tmp_path / 'a.jsonl'}, line {line}" for line in (1, 2)]
    assert data.row_of(10_000) == "sample 10000 of the stream"
    assert data.describe() == f"{tmp_path / 'a.jsonl'}: a stream, format prompt_completion"


BAD_LINE = '{"prompt": "Q", "completion": '


def write_with_bad_line(path: Path) -> str:
    write(path, 30)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:20], BAD_LINE, *lines[20:]]) + "\n")
    return str(path)


def test_a_broken_row_ends_all_ranks_at_the_same_step(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Row 21 is one of step 2, and only rank 1 would be given it; no rank gets a sample of that step."""
    train = write_with_bad_line(tmp_path / "a.jsonl")
    for rank in range(2):
        data, done = stream(tokenizer, train, shuffle_buffer=1), []
        with pytest.raises(UserError, match=r"a\.jsonl, line 21: broken JSON.*\(data\.on_bad_row skip leaves"):
            for index in indices_of_rank(rank, 2, 4):
                data.dataset[index]
                done.append(index)
        assert done == [index for index in indices_of_rank(rank, 2, 4) if index < 2 * GLOBAL_BATCH]


def test_broken_rows_are_skipped_and_counted_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    data = stream(tokenizer, write_with_bad_line(tmp_path / "a.jsonl"), shuffle_buffer=1, on_bad_row="skip")
    with caplog.at_level(logging.WARNING, "sparse_ds.data"):
        learned = answers(tokenizer, data, list(range(90)))
    assert list(learned.values()) == [f"r{number % 30}</s>" for number in range(90)]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("data.train: rows left out so far: 1. This one: ") and "line 21: broken JSON" in warning


def test_a_row_without_anything_left_is_replaced(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Found when it is tokenized: the next of the same step is used twice, on every world size."""
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "Q" * (100 if number in (3, 4, 7) else 1), "completion": f"r{number}"} for number in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [0, 1, 2, 5, 5, 5, 6, 0, *range(8, 16)]
    for world_size in (1, 2):
        learned: dict[int, str] = {}
        for rank in range(world_size):
            own = [index for index in indices_of_rank(rank, world_size, 2) if index < 16]
            learned |= answers(tokenizer, stream(tokenizer, str(path), shuffle_buffer=1), own)
        assert [learned[index] for index in range(16)] == [f"r{number}</s>" for number in expected]
    strict = stream(tokenizer, str(path), shuffle_buffer=1, truncate=False)
    strict.dataset[0]
    with pytest.raises(RuntimeError, match=r"line 4: the sample is longer than"):
        strict.dataset[3]


def test_a_step_without_any_usable_row(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "Q" * 100 if number else "Q", "completion": "A"} for number in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = stream(tokenizer, str(path), shuffle_buffer=1)
    data.dataset[0]
    with pytest.raises(UserError, match=r"data\.train: none of the 8 rows of step 2 can be used"):
        data.dataset[9]


def test_no_usable_row_at_all(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Q", "completion": ""}\n')
    with pytest.raises(UserError, match=r"data\.train: no usable sample in the whole stream"):
        stream(tokenizer, str(path), on_bad_row="skip")


def test_running_text_is_not_streamed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(UserError, match=r"data\.train: .*a\.txt is running text.*Set data\.streaming to false"):
        stream(tokenizer, str(tmp_path / "a.txt"))


def test_fingerprint(tmp_path: Path, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    path = tmp_path / "a.jsonl"
    train = write(path, 200)
    first = dataset_fingerprint(stream(tokenizer, train).dataset)
    moved = shutil.copy(path, tmp_path / "moved.jsonl")
    same = [
        stream(tokenizer, train, on_bad_row="skip"),
        stream(tokenizer, str(moved)),
        stream(tokenizer, [{"source": train, "weight": 1}]),
    ]
    assert {dataset_fingerprint(data.dataset) for data in same} == {first}
    others = [
        stream(tokenizer, train, seed=1),
        stream(tokenizer, train, shuffle_buffer=11),
        stream(tokenizer, train, template="chatml"),
        stream(tokenizer, train, sequence_length=4),
        stream(tokenizer, [{"source": train}, {"source": train}]),
        stream(make_tokenizer(template="$A"), train),
    ]
    path.write_text(path.read_text().replace('"r199"', '"r198"'))
    others.append(stream(make_tokenizer(), train))
    prints = [dataset_fingerprint(data.dataset) for data in others]
    assert len({first, *prints}) == 1 + len(prints)
