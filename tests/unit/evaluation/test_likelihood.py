"""Likelihoods and answers of batches against one text at a time in plain transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_ds.config.tasks import TaskConfig
from sparse_ds.evaluation.generation import generate_answers
from sparse_ds.evaluation.likelihood import score_texts
from sparse_ds.evaluation.prompts import ScoredText
from sparse_ds.evaluation.questions import Question, QuestionSet
from sparse_ds.evaluation.scoring import TaskScorer, longest_input

NUM_TOKENS = 8
CPU = torch.device("cpu")
SENTENCES = [
    "The opposite of sour is sweet.",
    "Leo has a brown plate.",
    "fish, doll, spoon",
    "a",
]


@torch.no_grad()
def one_text(model: Any, ids: list[int], start: int) -> tuple[float, bool]:
    """The definition: one token after another, from a model that sees only what is before it."""
    total, is_greedy = 0.0, True
    for position in range(start, len(ids)):
        logits: Tensor = model(input_ids=torch.tensor([ids[:position]])).logits[0, -1].double()
        total += float(logits[ids[position]] - logits.logsumexp(0))
        is_greedy &= int(logits.argmax()) == ids[position]
    return total, is_greedy


@pytest.fixture(scope="module")
def scored(embedded: tuple[Any, Any]) -> list[tuple[ScoredText, tuple[float, bool]]]:
    """Texts of different lengths with their likelihoods."""
    model, tokenizer = embedded
    texts = [ScoredText(ids, start) for ids in tokenizer(SENTENCES)["input_ids"] for start in {1, len(ids) - 1}]
    # A text whose scored token is the likeliest.
    ids = texts[0].ids[:5]
    with torch.no_grad():
        ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    texts.append(ScoredText(ids, len(ids) - 1))
    return [(text, one_text(model, text.ids, text.start)) for text in texts]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_likelihoods(
    embedded: tuple[Any, Any], scored: list[tuple[ScoredText, tuple[float, bool]]], batch_size: int
) -> None:
    model, tokenizer = embedded
    model.train()
    found = score_texts(model, [text for text, _ in scored], batch_size, tokenizer.pad_token_id, CPU)
    assert model.training, "it is left in the mode in which it was"
    model.eval()
    for (_, (total, is_greedy)), likelihood in zip(scored, found, strict=True):
        # fp32 logits, padded or not: sums in another order.
        assert likelihood.log_probability == pytest.approx(total, abs=1e-4)
        assert likelihood.is_greedy == is_greedy
    assert found[-1].is_greedy


@torch.no_grad()
def greedy(model: Any, prompt: list[int], max_new_tokens: int, eos_id: int) -> list[int]:
    ids = list(prompt)
    for _ in range(max_new_tokens):
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == eos_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def expected(embedded: tuple[Any, Any]) -> list[str]:
    """The answers to SENTENCES."""
    model, tokenizer = embedded
    prompts = [tokenizer(text)["input_ids"] for text in SENTENCES]
    return [tokenizer.decode(greedy(model, prompt, NUM_TOKENS, tokenizer.eos_token_id)) for prompt in prompts]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_answers(embedded: tuple[Any, Any], expected: list[str], batch_size: int) -> None:
    model, tokenizer = embedded
    prompts = [tokenizer(text)["input_ids"] for text in SENTENCES]
    model.train()
    settings = {"max_new_tokens": NUM_TOKENS, "batch_size": batch_size, "device": CPU}
    assert generate_answers(model, tokenizer, prompts, stop=[], **settings) == expected
    assert model.training
    model.eval()
    # A text of one of the answers ends it; the others that hold it end there as well.
    stop = max(expected, key=len).split()[2]
    cut = [answer[: answer.index(stop)] if stop in answer else answer for answer in expected]
    assert cut != expected
    assert generate_answers(model, tokenizer, prompts, stop=[stop, "never"], **settings) == cut


def test_an_answer_ends_at_the_models_own_end_of_turn(embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    prompt = tokenizer(SENTENCES[1])["input_ids"]
    written = greedy(model, prompt, NUM_TOKENS, tokenizer.eos_token_id)
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, written[3]]
    try:
        settings = {"max_new_tokens": NUM_TOKENS, "batch_size": 1, "device": CPU, "stop": []}
        (answer,) = generate_answers(model, tokenizer, [prompt], **settings)
    finally:
        model.generation_config.eos_token_id = before
    end = written.index(written[3])
    assert answer == tokenizer.decode(written[:end], skip_special_tokens=True)


def test_a_task_from_questions_to_score(embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    first, last = "The opposite of sour is sweet.", "The opposite of sour is spoon."
    questions = tuple(Question("The opposite of sour is", ("sweet.", "spoon."), gold, "", "row") for gold in (0, 1))
    task = QuestionSet("quiz", "multiple_choice", TaskConfig(source="quiz"), questions)
    scorer = TaskScorer(task, tokenizer, longest_input(model.config))
    start = len(tokenizer("The opposite of sour is")["input_ids"])
    sums = [one_text(model, tokenizer(text)["input_ids"], start)[0] for text in (first, last)]
    score = scorer.score(model, 3, CPU)
    # One of the two contrary questions is right, whichever choice is likelier.
    assert sums[0] != sums[1]
    assert score.accuracy == 0.5
    assert score.to_record() == {
        "task": "quiz",
        "task_kind": "multiple_choice",
        "num_samples": 2,
        "num_truncated": 0,
        "chance": 0.5,
        **score.metrics,
    }
    gold = int(sums[1] > sums[0])
    task = QuestionSet("quiz", "multiple_choice", TaskConfig(source="quiz"), questions[gold : gold + 1])
    assert TaskScorer(task, tokenizer, 128).score(model, 1, CPU).accuracy == 1.0
