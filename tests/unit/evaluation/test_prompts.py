"""Questions to ids, with one token a character: `5 + byte`; one merge, `ab`; BOS is 1."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sparse_ds.config.errors import UserError
from sparse_ds.config.tasks import TaskConfig
from sparse_ds.evaluation.prompts import PromptEncoder
from sparse_ds.evaluation.questions import Question, QuestionSet

TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def ids(text: str) -> list[int]:
    return [5 + byte for byte in text.encode()]


def task(prompt: str, *choices: str, **settings: Any) -> QuestionSet:
    kind = "multiple_choice" if choices else "exact_match"
    question = Question(prompt, choices, 0, "", "quiz.jsonl, line 1")
    return QuestionSet("quiz", kind, TaskConfig(source="quiz.jsonl", **settings), (question,))


@pytest.mark.parametrize(
    ("prompt", "choice", "context", "scored"),
    [
        ("Q", "x", "Q", " x"),
        ("Q:\n", "x", "Q:", "\nx"),
        ("Q  ", "x", "Q", "  x"),
    ],
)
def test_blanks_belong_to_the_choice(
    tokenizer: PreTrainedTokenizerFast, prompt: str, choice: str, context: str, scored: str
) -> None:
    first, _ = PromptEncoder(tokenizer, 100).scored_texts(task(prompt, choice, "other")).texts
    assert first.ids == [1, *ids(context), *ids(scored)]
    assert first.start == 1 + len(context)


def test_what_does_not_fit_loses_its_beginning(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = PromptEncoder(tokenizer, 5).scored_texts(task("0123456", "xy", "z"))
    assert encoded.num_truncated == 2
    assert encoded.texts == [(ids("56 xy"), 2), (ids("456 z"), 3)]
    with pytest.raises(UserError, match=r"quiz\.jsonl, line 1: the choice 'vwxyz' has 6 tokens of its own, exp"):
        PromptEncoder(tokenizer, 6).scored_texts(task("0", "vwxyz", "z"))
    prompts = PromptEncoder(tokenizer, 6).prompts(task("0123456", max_new_tokens=4))
    assert prompts == ([ids("56")], 1)
    with pytest.raises(UserError, match="task quiz: max_new_tokens is 6, and the model takes 6 tokens in all"):
        PromptEncoder(tokenizer, 6).prompts(task("0", max_new_tokens=6))


def test_a_choice_that_melts_into_the_question(tokenizer: PreTrainedTokenizerFast) -> None:
    # `ab` is one token: with nothing between them, the question's `a` would lie inside it.
    chat = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.chat_template = chat
    with pytest.raises(UserError, match="the choice 'b' has 0 tokens of its own"):
        PromptEncoder(tokenizer, 20).scored_texts(task("a", "b", "c", chat=True))


def test_through_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="chat template"):
        PromptEncoder(tokenizer, 20).prompts(task("Q", chat=True, max_new_tokens=2))
    tokenizer.chat_template = TEMPLATE
    turn, end = tokenizer.convert_tokens_to_ids(["<|turn|>", "<|end|>"])
    encoder = PromptEncoder(tokenizer, 20)
    # No BOS: the template writes none. No blank between question and choice.
    asked = [turn, *ids("Q"), end, *ids(">")]
    assert encoder.prompts(task("Q", chat=True, max_new_tokens=2)).prompts == [asked]
    assert encoder.scored_texts(task("Q", "x", "y", chat=True)).texts[1] == ([*asked, *ids("y")], 4)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match=r"quiz\.jsonl, line 1: the chat template refuses the question: no"):
        encoder.prompts(task("Q", chat=True, max_new_tokens=2))
