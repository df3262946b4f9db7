"""Answers to scores, by hand."""

from __future__ import annotations

import math

import pytest

from sparse_ds.evaluation.grading import find_answer, grade_answers, grade_choices, grade_continuations, is_same
from sparse_ds.evaluation.likelihood import Likelihood
from sparse_ds.evaluation.questions import Question

GSM8K = r"#### (-?[0-9.,]+)"


def choice(*choices: str, gold: int) -> Question:
    return Question("?", choices, gold, "", "row")


def test_multiple_choice() -> None:
    questions = [choice("ab", "abcdefgh", gold=1), choice("x", "y", "z", "w", gold=0)]
    sums = [-2.0, -4.0, -1.0, -1.0, -3.0, -2.0]
    metrics, chance = grade_choices(questions, [Likelihood(total, False) for total in sums])
    # By the sum the short choice wins (wrong), by the character the long one (right); equal ones: the first.
    assert metrics["accuracy"] == 0.5
    assert metrics["accuracy_norm"] == 1.0
    assert metrics["accuracy_stderr"] == pytest.approx(math.sqrt(0.25 / 1))
    assert chance == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_continuations() -> None:
    metrics = grade_continuations([Likelihood(-1.0, True), Likelihood(-3.0, False)], num_tokens=8)
    assert metrics["accuracy"] == 0.5
    assert metrics["perplexity"] == pytest.approx(math.exp(0.5))
    assert metrics["perplexity_per_row"] == pytest.approx(math.exp(2.0))
    assert grade_continuations([Likelihood(-1e6, False)], 1)["perplexity"] == math.inf
    assert math.isnan(grade_continuations([Likelihood(-1.0, True)], 1)["accuracy_stderr"])


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        ("\n  the cat \nand more", None, "the cat"),
        (" \n ", None, None),
        ("so 3 + 4\n#### 7\nQuestion: #### 8", GSM8K, "7"),
        ("#### 1,200.", GSM8K, "1,200."),
        ("nothing here", GSM8K, None),
        ("It is B.", r"[A-D](?=\.)", "B"),
        ("b", r"(a)|b", None),
    ],
)
def test_the_answer_in_a_text(text: str, pattern: str | None, answer: str | None) -> None:
    assert find_answer(text, pattern) == answer


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("a  b", " a b ", True),
        ("A b", "a b", False),
        ("1,200", "1200", True),
        ("$1200", "1200.0", True),
        ("1200.", "1200", True),
        ("-3", "3", False),
        ("+3", "3", True),
        ("50%", "50", True),
        ("12 00", "1200", False),
        ("1.2.3", "1.2", False),
        ("", "0", False),
    ],
)
def test_what_counts_as_the_same(answer: str, reference: str, same: bool) -> None:
    assert is_same(answer, reference) is same


def test_exact_match() -> None:
    references = ["1 + 1 = 2\n#### 2", "7", "8"]
    questions = [Question("?", (), 0, reference, "row") for reference in references]
    metrics = grade_answers(questions, ["#### 2.0 done", "#### 8", "no idea"], GSM8K)
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["num_unanswered"] == 1
