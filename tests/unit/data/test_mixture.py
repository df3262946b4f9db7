"""How many samples of each source a mixture takes, which ones, and that it says where they come from."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sparse_ds.config.errors import UserError
from sparse_ds.config.schema import DataConfig
from sparse_ds.data import DataBundle, build_datasets
from sparse_ds.data.mixture import count_tokens, draw_samples


def write(folder: Path, name: str, num_rows: int) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": f"{name}{number}"}) + "\n" for number in range(num_rows)))
    return str(path)


def mixed(tokenizer: PreTrainedTokenizerFast, *parts: dict[str, Any], seed: int = 0, **others: Any) -> DataBundle:
    settings = DataConfig.model_validate({"train": list(parts), "eval": None, "sequence_length": 64, **others})
    return build_datasets(settings, tokenizer, seed=seed)


def texts_of(tokenizer: PreTrainedTokenizerFast, bundle: DataBundle) -> list[str]:
    return [tokenizer.decode(sample["input_ids"], skip_special_tokens=True) for sample in bundle.train]


@pytest.mark.parametrize(
    ("part", "counts"),
    [
        ({}, {1: 10}),
        ({"weight": 1}, {1: 10}),
        ({"weight": 0.3}, {1: 3}),
        ({"weight": 2.5}, {2: 5, 3: 5}),
        ({"num_samples": 4}, {1: 4}),
        ({"num_samples": 23}, {2: 7, 3: 3}),
    ],
)
def test_every_sample_as_often_as_the_weight_says(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, part: dict[str, Any], counts: dict[int, int]
) -> None:
    other = {"source": write(tmp_path, "b", 3)}
    bundle = mixed(tokenizer, {"source": write(tmp_path, "a", 10), **part}, other)
    texts = texts_of(tokenizer, bundle)
    assert texts[-3:] == ["b0", "b1", "b2"]
    times = Counter(texts[:-3])
    assert Counter(times.values()) == counts
    assert set(times) <= {f"a{number}" for number in range(10)}
    assert bundle.train_data.num_tokens == sum(map(len, bundle.train["input_ids"]))
    # The first token of a text is BOS, which is predicted from nothing.
    assert bundle.num_trained_tokens == bundle.train_data.num_tokens - len(texts)


def test_what_is_drawn_depends_on_the_seed_and_the_place(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [{"source": write(tmp_path, name, 100), "num_samples": 10} for name in "ab"]
    first, again, other = (texts_of(tokenizer, mixed(tokenizer, *parts, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert [text[1:] for text in first[:10]] != [text[1:] for text in first[10:]]


def test_every_sample_may_be_drawn() -> None:
    drawn = Counter(index for seed in range(300) for index in draw_samples(10, 3, str(seed)))
    assert set(drawn) == set(range(10))
    # 90 draws expected of each; the standard deviation is below 8.
    assert all(50 < count < 130 for count in drawn.values())


def test_rows_are_named_with_their_source(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": 5}\n{"text": "y"}\n')
    bundle = mixed(tokenizer, {"source": str(path)}, {"source": write(tmp_path, "b", 2)}, on_bad_row="skip")
    rows = [bundle.train_data.row_of(sample) for sample in range(4)]
    assert rows == [
        f"{path}, row 0",
        f"{path}, row 2",
        f"{tmp_path / 'b.jsonl'}, row 0",
        f"{tmp_path / 'b.jsonl'}, row 1",
    ]
    with pytest.raises(IndexError):
        bundle.train_data.row_of(4)


def test_formats_of_their_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    both = tmp_path / "both.jsonl"
    both.write_text(json.dumps({"prompt": "Q", "completion": "A", "question": "R", "answer": "B", "text": "T"}) + "\n")
    parts = [{"source": str(both)}, {"source": str(both), "format": "text"}]
    settings = DataConfig.model_validate({"train": parts, "eval": None, "format": "prompt_completion"})
    with caplog.at_level(logging.INFO, "sparse_ds.data"):
        bundle = build_datasets(settings, tokenizer, show_progress=True)
    assert texts_of(tokenizer, bundle) == ["QA", "T"]
    assert bundle.format_name == "prompt_completion + text"
    said = [record.getMessage() for record in caplog.records]
    assert said[-1].startswith(
        f"data.train: mixture of 2 samples (1 of {both}, 1 of {both}), 7 tokens, 4 of them trained"
    )


def test_weight_too_small(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"data\.train\[0\]\.weight: 0\.01 of the 10 samples of .* less than one"):
        mixed(tokenizer, {"source": write(tmp_path, "a", 10), "weight": 0.01})


def test_mistakes_name_the_entry(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"data\.train\[1\]\.source: no such file"):
        mixed(tokenizer, {"source": write(tmp_path, "a", 1)}, {"source": str(tmp_path / "none.jsonl")})


def test_tokens_are_counted_as_samples_count_them(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "Q" * (number % 3), "completion": "A" * (1 + number % 5)} for number in range(2500)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = build_datasets(DataConfig(train=str(path), eval=None), tokenizer).train_data
    assert count_tokens(data.dataset) == (data.num_tokens, data.num_trained_tokens)
    picked = data.dataset.select([2499, 3, 3])
    labels = picked["labels"][:]
    expected = sum(label != -100 for sample in labels for label in sample[1:])
    assert count_tokens(picked) == (sum(map(len, labels)), expected)
