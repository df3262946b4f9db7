"""Ids of labeled texts: golden numbers, the tokenizer's own for encoders, instructions, and what is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import BertTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from sparse_ds.config.errors import UserError
from sparse_ds.data.collation import ClassificationCollator
from sparse_ds.data.formats import LabeledText
from sparse_ds.data.labeled_texts import ClassifierInputs, LabeledTextEncoder

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "is", "it", "?"]
BERT = ClassifierInputs(is_encoder=True, has_token_types=True, max_tokens=9)
ROBERTA = ClassifierInputs(is_encoder=True, max_tokens=12)
BOS, EOS = 1, 2


def bert() -> BertTokenizer:
    return BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})


def roberta() -> RobertaTokenizer:
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "\u0120", *"abcdefg"]
    return RobertaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])


def sample(text: str, pair: str | None = None) -> LabeledText:
    return LabeledText(text, "x", "rows.jsonl, line 7", pair)


def encoder(tokenizer: Any, inputs: ClassifierInputs, length: int = 64, **others: Any) -> LabeledTextEncoder:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return LabeledTextEncoder(tokenizer, length, inputs, pad, **others)


def ids_of(text: str) -> list[int]:
    return [BOS, *(5 + byte for byte in text.encode())]


def test_golden_ids_of_bert() -> None:
    found = encoder(bert(), BERT).encode([sample("a b"), sample("a", "b c"), sample("c ?")])
    assert [one.input_ids for one in found] == [[2, 5, 6, 3], [2, 5, 3, 6, 7, 3], [2, 7, 10, 3]]
    assert [one.token_type_ids for one in found] == [[0] * 4, [0, 0, 0, 1, 1, 1], [0] * 4]
    assert not any(one.is_truncated for one in found)


def test_golden_ids_of_roberta() -> None:
    found = encoder(roberta(), ROBERTA).encode([sample("ab"), sample("a", "b c")])
    assert [one.input_ids for one in found] == [[0, 6, 7, 2], [0, 6, 2, 2, 7, 5, 8, 2]]
    assert [one.token_type_ids for one in found] == [[], []]


@pytest.mark.parametrize("tokenizer", [bert(), roberta()], ids=["bert", "roberta"])
@pytest.mark.parametrize("text", ["a b c", "a b c a b c a b c a b c"])
@pytest.mark.parametrize("pair", [None, "b", "c b a c b a c b a c b a"])
def test_an_encoder_gets_what_its_tokenizer_makes(tokenizer: Any, text: str, pair: str | None) -> None:
    inputs = BERT if isinstance(tokenizer, BertTokenizer) else ROBERTA
    (found,) = encoder(tokenizer, inputs).encode([sample(text, pair)])
    expected = tokenizer(text, pair, truncation=True, max_length=inputs.max_tokens)
    assert found.input_ids == expected["input_ids"] and len(found.input_ids) <= (inputs.max_tokens or 0)
    assert found.token_type_ids == expected.get("token_type_ids", [])
    assert found.is_truncated == (len(tokenizer(text, pair)["input_ids"]) > (inputs.max_tokens or 0))


def test_the_shorter_of_both_limits_counts() -> None:
    assert encoder(bert(), BERT).sequence_length == 9
    assert encoder(bert(), BERT, 5).sequence_length == 5
    (found,) = encoder(bert(), BERT, 5).encode([sample("a b c a b c")])
    assert found.input_ids == [2, 5, 6, 7, 3]


def test_a_decoder_joins_pairs_and_cuts_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    found = encoder(tokenizer, ClassifierInputs(), 6).encode([sample("x", "y"), sample("x", "yyyyy"), sample("xyz")])
    assert [one.input_ids for one in found] == [ids_of("x\ny"), ids_of("x\nyyy"), ids_of("xyz")]
    assert [one.is_truncated for one in found] == [False, True, False]


@pytest.mark.parametrize(
    ("instruction", "pair", "text"),
    [
        ("<{text}>", None, "<x>"),
        ("{text}{text}", None, "xx"),
        ("{{text}} {other}", None, "{x} {other}"),
        ("<{text}>", "y", "<x\ny>"),
        ("{text_pair}|{text}", "y", "y|x"),
        ("{text}|{text_pair}", "{text}", "x|{text}"),
        ("Q: {text}</s>A:", None, "Q: x</s>A:"),
    ],
)
def test_an_instruction(tokenizer: PreTrainedTokenizerFast, instruction: str, pair: str | None, text: str) -> None:
    (found,) = encoder(tokenizer, ClassifierInputs(), instruction=instruction).encode([sample("x", pair)])
    expected = ids_of(text)
    if "</s>" in text:
        before, after = text.split("</s>")
        expected = [*ids_of(before), EOS, *ids_of(after)[1:]]
    assert found.input_ids == expected


def test_what_is_too_long_loses_no_part_of_the_instruction(tokenizer: PreTrainedTokenizerFast) -> None:
    one = encoder(tokenizer, ClassifierInputs(), 10, instruction="Q {text} A:")
    found = one.encode([sample("xyz"), sample("xyzxyz"), sample("x", "yyyyyyyy")])
    assert [each.input_ids for each in found] == [ids_of("Q xyz A:"), ids_of("Q xyzx A:"), ids_of("Q x\nyy A:")]
    assert [each.is_truncated for each in found] == [False, True, True]
    two = encoder(tokenizer, ClassifierInputs(), 10, instruction="{text}|{text_pair}|?")
    (found_pair,) = two.encode([sample("xxxxxxxx", "yy")])
    assert found_pair.input_ids == ids_of("xxxx|yy|?")
    (found_bert,) = encoder(bert(), BERT, 7, instruction="is {text} ?").encode([sample("a b c a b c")])
    assert found_bert.input_ids == [2, 8, 5, 6, 7, 10, 3] and found_bert.is_truncated


def test_bad_instructions(tokenizer: PreTrainedTokenizerFast) -> None:
    wants_pair = encoder(tokenizer, ClassifierInputs(), instruction="{text} {text_pair}")
    fine, bad, empty = wants_pair.encode([sample("x", "y"), sample("x"), sample("x", "")])
    assert isinstance(bad, UserError)
    assert "line 7: has no second text, which data.instruction wants as {text_pair}" in str(bad)
    assert not isinstance(fine, UserError) and fine.input_ids == ids_of("x y")
    assert not isinstance(empty, UserError) and empty.input_ids == ids_of("x ")
    with pytest.raises(UserError, match=r"data.instruction: takes more than data.sequence_length = 5 tokens by itself"):
        encoder(tokenizer, ClassifierInputs(), 5, instruction="far too long {text}").encode([sample("x")])


def test_a_batch_stays_within_the_positions_of_the_model() -> None:
    samples = [
        {"input_ids": [2, 5, 3], "token_type_ids": [0, 0, 0], "label": 1},
        {"input_ids": [2, *[5] * 7, 3], "token_type_ids": [*[0] * 4, *[1] * 5], "label": 0},
    ]
    batch = ClassificationCollator(0, max_tokens=9)(samples)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (2, 9),
        "attention_mask": (2, 9),
        "token_type_ids": (2, 9),
        "labels": (2,),
    }
    assert batch["token_type_ids"].tolist() == [[0] * 9, [*[0] * 4, *[1] * 5]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert ClassificationCollator(0)(samples)["input_ids"].shape == (2, 16)
