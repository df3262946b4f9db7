"""What the preview counts and shows, on samples whose tokens can be counted by hand (one a byte, BOS 1, EOS 2)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sparse_ds.data import build_dataset
from sparse_ds.data.preview import MAX_STREAMED, SourceFacts, TokenView, bin_lengths, look_at, view_tokens
from sparse_ds.data.preview_text import preview_text, summary_rows
from sparse_ds.data.token_doctor import Finding

WriteJsonl = Callable[..., Path]


def facts_of(
    tokenizer: PreTrainedTokenizerFast, path: Path, *, sequence_length: int = 12, num_shown: int = 2
) -> SourceFacts:
    data = build_dataset(path, tokenizer, sequence_length=sequence_length)
    return look_at(data, tokenizer, "data.train", sequence_length, num_shown)


def test_counts(tokenizer: PreTrainedTokenizerFast, write_jsonl: WriteJsonl) -> None:
    rows = [
        {"prompt": "Q:", "completion": "yes"},  # 1 + 2 + 3 + 1 tokens, 4 of them trained
        {"prompt": "Q:", "completion": "yes"},
        {"prompt": "Q:", "completion": "no"},  # 6, 3
        {"prompt": "Q:", "completion": "0123456789"},  # 14 cut to 12, 9
        {"prompt": "01234567890123", "completion": "x"},  # nothing left to learn
    ]
    facts = facts_of(tokenizer, write_jsonl(*rows))
    assert facts.lengths.tolist() == [7, 7, 6, 12]
    assert (facts.num_samples, facts.num_tokens, facts.num_trained_tokens) == (4, 32, 4 + 4 + 3 + 9)
    assert (facts.num_truncated, facts.num_dropped, facts.num_duplicates, facts.num_cut) == (1, 1, 1, 1)
    assert (facts.num_bos_first, facts.num_bos_twice, facts.num_end_trained, facts.num_end_masked) == (4, 0, 3, 0)
    assert (facts.num_eos_inside, facts.num_pad_inside, facts.num_unknown_tokens) == (0, 0, 0)
    assert facts.largest_id == 5 + ord("y")
    assert len(facts.digests) == 3
    assert [sample.number for sample in facts.samples] == [0, 2]
    shown = facts.samples[1].tokens
    assert shown[0] == TokenView(1, "<s>", is_trained=False, is_special=True)
    assert shown[3:] == [
        TokenView(5 + ord("n"), "n", is_trained=True, is_special=False),
        TokenView(5 + ord("o"), "o", is_trained=True, is_special=False),
        TokenView(2, "</s>", is_trained=True, is_special=True),
    ]


def test_the_first_token_of_a_text_is_not_trained(tokenizer: PreTrainedTokenizerFast, write_jsonl: WriteJsonl) -> None:
    facts = facts_of(tokenizer, write_jsonl({"text": "ab</s>c"}))
    assert [token.is_trained for token in facts.samples[0].tokens] == [False, True, True, True, True]
    assert facts.num_trained_tokens == 4
    assert facts.num_eos_inside == 1


def test_characters_of_several_tokens_and_blanks(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(" aé€ b")["input_ids"]
    views = view_tokens(tokenizer, ids, [False] * len(ids))
    assert [view.token_id for view in views] == ids
    assert [view.text for view in views] == ["<s>", " ", "a", "", "é", "", "", "€", " ", "b"]
    # Cut inside a character: the rest shows what is there.
    assert view_tokens(tokenizer, ids[:7], [False] * 7)[-1].text == "\N{REPLACEMENT CHARACTER}"


def test_a_stream_is_looked_at_from_its_beginning(tokenizer: PreTrainedTokenizerFast) -> None:
    class Streamed:
        source, format_name = "owner/name", "text"

        @property
        def dataset(self) -> Any:
            def samples() -> Any:
                while True:
                    yield {"input_ids": [1, 70, 2], "labels": [1, 70, 2]}

            return samples()

    facts = look_at(Streamed(), tokenizer, "data.train", 8, num_shown=2)
    assert (facts.num_samples, facts.is_part, facts.num_truncated) == (MAX_STREAMED, True, None)
    assert [sample.number for sample in facts.samples] == [0, 1]
    assert ("samples", f"{MAX_STREAMED:,} (the first of a stream)") in summary_rows(facts)


@pytest.mark.parametrize(
    ("lengths", "bins"),
    [
        ([1, 2, 2], [(1, 1, 1), (2, 2, 2)]),
        ([30, 41, 42, 60], [(26, 30, 1), (31, 35, 0), (36, 40, 0), (41, 45, 2), (46, 50, 0), (51, 55, 0), (56, 60, 1)]),
        ([1, 2048], [(1, 200, 1), *((n + 1, n + 200, 0) for n in range(200, 2000, 200)), (2001, 2048, 1)]),
    ],
)
def test_histogram(lengths: list[int], bins: list[tuple[int, int, int]]) -> None:
    assert bin_lengths(np.array(lengths)) == bins


def test_text(tokenizer: PreTrainedTokenizerFast, write_jsonl: WriteJsonl) -> None:
    facts = facts_of(tokenizer, write_jsonl({"prompt": "Q:", "completion": "yes"}), num_shown=1)
    findings = [Finding("warning", "mind this " * 20), Finding("fine", "good")]
    lines = preview_text([facts], findings, colour=False).splitlines()
    assert "<s>Q:⟦yes</s>⟧" in lines
    assert "trained tokens  4 (57.1%)" in lines
    assert "7-7  ########################################  1" in lines
    assert "WARNING mind this" in "\n".join(lines) and "ok      good" in lines
    assert max(map(len, lines)) <= 100
    coloured = preview_text([facts], findings, colour=True)
    assert "\x1b[2mQ\x1b[0m\x1b[2m:\x1b[0m\x1b[32my\x1b[0m" in coloured
    assert "\x1b[32m\x1b[7m</s>\x1b[0m" in coloured


def test_a_long_sample_loses_its_middle_in_the_terminal(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: WriteJsonl
) -> None:
    facts = facts_of(tokenizer, write_jsonl({"text": "x" * 500}), sequence_length=1000, num_shown=1)
    assert f"{'x' * 199} ... 102 tokens ... {'x' * 199}</s>" in preview_text([facts], [], colour=False).replace(
        "⟦", ""
    ).replace("⟧", "")


def test_a_line_end_behind_the_last_special_token_is_no_end(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: WriteJsonl
) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    encoder = {"data_format": "auto", "sequence_length": 64}
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + m['content'] + '</s>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
    )
    data = build_dataset(write_jsonl({"messages": turns}), tokenizer, **encoder)
    facts = look_at(data, tokenizer, "data.train", 64, 1)
    assert facts.samples[0].tokens[-1].text == "\n" and not facts.samples[0].tokens[-1].is_trained
    assert (facts.num_end_trained, facts.num_end_masked, facts.num_eos_inside) == (1, 0, 0)
