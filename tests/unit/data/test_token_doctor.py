"""Every illness is found, and the healthy are left alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sparse_ds.data.preview import SourceFacts
from sparse_ds.data.token_doctor import Finding, RunFacts, examine, padding_fraction

RUN = RunFacts(sequence_length=64, max_positions=128, vocabulary_size=300, global_batch_size=8, micro_batch_size=2)


def source(name: str = "data.train", **changes: Any) -> SourceFacts:
    """100 healthy samples of 20 tokens, 8 of them trained."""
    facts = SourceFacts(name, f"{name}.jsonl", "alpaca", None, False, 0, 0, lengths=np.full(100, 20))
    facts.num_trained_tokens, facts.num_bos_first, facts.num_end_trained = 800, 100, 100
    facts.digests = {f"{name}{number}".encode() for number in range(100)}
    for field, value in changes.items():
        setattr(facts, field, value)
    return facts


def said(found: list[Finding], level: str) -> list[str]:
    return [one.text for one in found if one.level == level]


def test_healthy(tokenizer: PreTrainedTokenizerFast) -> None:
    found = examine(source(), source("data.eval"), tokenizer, RUN)
    assert said(found, "warning") == said(found, "note") == []
    assert "data.train: every sample starts with the BOS token '<s>'." in said(found, "fine")
    assert "no held-out sample is in the training data." in said(found, "fine")
    assert any("the tokenizer has no pad token, so '</s>' fills short rows" in text for text in said(found, "fine"))


@pytest.mark.parametrize(
    ("changes", "level", "expected"),
    [
        ({"num_bos_twice": 3}, "warning", "3 of 100 samples (3.0%) start with '<s>' twice"),
        ({"num_bos_first": 0}, "warning", "100 of 100 samples (100.0%) do not start with '<s>', which the tokenizer"),
        (
            {"num_bos_first": 1, "format_name": "text"},
            "fine",
            "1 of 100 samples (1.0%) start with '<s>': the beg",
        ),
        ({"num_end_trained": 0, "num_end_masked": 100}, "warning", "end with a special token that is not trained"),
        ({"num_end_trained": 10}, "warning", "90 of 100 samples (90.0%) end without a special token, though they are"),
        ({"num_end_trained": 90}, "note", "10 of 100 samples (10.0%) end without a special token"),
        ({"num_end_trained": 0, "format_name": "text"}, "note", "running text is cut into blocks without an end"),
        ({"num_eos_inside": 5}, "note", "5 of 100 samples (5.0%) have a trained '</s>' before their end"),
        ({"num_trained_tokens": 20}, "warning", "only 1.0% of the tokens are trained"),
        ({"num_trained_tokens": 1900}, "warning", "every token is trained, the prompts too"),
        ({"num_truncated": 6, "num_cut": 6, "num_end_trained": 94}, "warning", "6 of 100 samples (6.0%) are longer"),
        ({"num_truncated": 5, "num_cut": 5, "num_end_trained": 95}, "note", "5 of 100 samples (5.0%) are longer"),
        ({"num_truncated": None, "num_cut": 6, "num_end_trained": 94}, "warning", "6 of 100 samples (6.0%) are longer"),
        ({"num_dropped": 1}, "warning", "1 samples are left out"),
        ({"num_duplicates": 2}, "warning", "2 of 100 samples (2.0%) are equal to an earlier one"),
        ({"num_unknown_tokens": 3}, "warning", "3 tokens (0.15%) are '<unk>'"),
        (
            {"lengths": np.full(7, 20), "num_bos_first": 7, "num_end_trained": 7},
            "warning",
            "7 samples are fewer",
        ),
        ({"lengths": np.full(100, 129)}, "warning", "the longest sample has 129 tokens, the model knows 128 positions"),
        ({"largest_id": 300}, "warning", "the tokenizer gives the id 300, the model's vocabulary ends at 299"),
        ({"lengths": np.array([2, 90] * 50)}, "note", "micro batches of 2 random samples are"),
    ],
)
def test_ill(tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any], level: str, expected: str) -> None:
    found = examine(source(**changes), None, tokenizer, RUN)
    assert any(expected in text for text in said(found, level)), found
    assert not any(expected in text for text in said(examine(source(), None, tokenizer, RUN), level))


def test_samples_that_are_cut_need_no_end(tokenizer: PreTrainedTokenizerFast) -> None:
    found = examine(source(num_cut=4, num_truncated=4, num_end_trained=96), None, tokenizer, RUN)
    assert any("every sample that is not cut ends with a special token" in text for text in said(found, "fine"))


def test_leaks(tokenizer: PreTrainedTokenizerFast) -> None:
    train, heldout = source(), source("data.eval")
    heldout.digests = {*list(heldout.digests)[:98], *list(train.digests)[:2]}
    (text,) = said(examine(train, heldout, tokenizer, RUN), "warning")
    assert text.startswith("2 of 100 different held-out samples are in the training data too")


def test_a_pad_token_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = "<unk>"
    found = examine(source(), None, tokenizer, RUN)
    assert "padding has a token of its own, '<unk>', which no sample holds." in said(found, "fine")
    (text,) = said(examine(source(num_pad_inside=1), None, tokenizer, RUN), "warning")
    assert "1 of 100 samples (1.0%) hold the pad token '<unk>' as if it were text" in text


def test_labels(tokenizer: PreTrainedTokenizerFast) -> None:
    healthy = source(labels=("bad", "good"), label_counts=Counter({0: 40, 1: 60}), num_end_trained=0)
    found = examine(healthy, None, tokenizer, RUN)
    assert said(found, "warning") == []
    assert "data.train: the most frequent label is 'good' with 60.0%: who always says it is right so often." in said(
        found, "fine"
    )
    ill = source(labels=("bad", "good", "fair"), label_counts=Counter({0: 95, 1: 5}))
    assert said(examine(ill, None, tokenizer, RUN), "warning") == [
        "data.train: no sample has the label 'fair'.",
        "data.train: the most frequent label is 'bad' with 95.0%: who always says it is right so often.",
    ]


def test_a_tokenizer_without_bos(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(template=None)
    found = examine(source(num_bos_first=0), None, tokenizer, RUN)
    assert said(found, "warning") == []
    assert any("this tokenizer does not put one in front either" in text for text in said(found, "fine"))
    mixed = examine(source(num_bos_first=50), None, tokenizer, RUN)
    assert any("50 of 100 samples (50.0%) start with the BOS token '<s>', the others" in t for t in said(mixed, "note"))


def test_padding_fraction() -> None:
    assert padding_fraction(np.full(10, 7), 5) == 0.0
    # Pairs of 1 and 9 are 8 of 18 padding, equal pairs none: between them for a random order.
    assert 0.0 < padding_fraction(np.array([1, 9] * 50), 2) < 8 / 18
    assert padding_fraction(np.array([1, 9]), 2) == pytest.approx(8 / 18)
