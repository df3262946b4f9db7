"""Answers to right or wrong, and the score of a task.

    exact match       the answer, taken out of the generated text, equals the reference
    multiple choice   accuracy       the choice with the largest log-probability is right
                      accuracy_norm  the same of the log-probability / characters of the choice
    continuation      accuracy       every token is the one that the model finds likeliest
                      perplexity     exp(-sum of log-probabilities / tokens), over all rows

The first of equal choices wins, as in lm-evaluation-harness, whose `acc`, `acc_norm` and per-token perplexity these are
(its `perplexity` of a continuation is per row: `exp(-sum / rows)`, given here as `perplexity_per_row`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparse_ds.evaluation.likelihood import Likelihood
from sparse_ds.evaluation.questions import Question
from sparse_ds.monitor.summary import perplexity

_NUMBER = re.compile(r"[-+]?[$€£]?\d[\d,]*(\.\d+)?%?\.?")


@dataclass(frozen=True)
class TaskScore:
    """What a model scores on one task.

    Attributes:
        task: its name.
        kind: `multiple_choice`, `continuation` or `exact_match`.
        num_samples: questions asked.
        num_truncated: prompts, or texts of a question with a choice, that lost their beginning.
        metrics: name -> value; `accuracy` is always there, with `accuracy_stderr`, its standard error.
        chance: accuracy of guessing, for multiple choice; else None.
    """

    task: str
    kind: str
    num_samples: int
    num_truncated: int
    metrics: dict[str, float]
    chance: float | None = None

    @property
    def accuracy(self) -> float:
        """Share of the questions answered right, 0 to 1."""
        return self.metrics["accuracy"]

    def to_record(self) -> dict[str, Any]:
        """The fields in plain types."""
        record = {"task": self.task, "task_kind": self.kind, "num_samples": self.num_samples}
        return {**record, "num_truncated": self.num_truncated, **self.metrics, "chance": self.chance}


def grade_choices(questions: Sequence[Question], likelihoods: Sequence[Likelihood]) -> tuple[dict[str, float], float]:
    """(metrics, accuracy of guessing) of multiple choice; the likelihoods are in the order of questions and choices."""
    right, right_norm = [], []
    remaining = iter(likelihoods)
    for question in questions:
        sums = [next(remaining).log_probability for _ in question.choices]
        norms = [total / len(choice) for total, choice in zip(sums, question.choices, strict=True)]
        right.append(sums.index(max(sums)) == question.gold)
        right_norm.append(norms.index(max(norms)) == question.gold)
    chance = sum(1 / len(question.choices) for question in questions) / len(questions)
    return {**_shares("accuracy", right), **_shares("accuracy_norm", right_norm)}, chance


def grade_continuations(likelihoods: Sequence[Likelihood], num_tokens: int) -> dict[str, float]:
    """Metrics of continuations with `num_tokens` scored tokens in all."""
    total = -sum(each.log_probability for each in likelihoods)
    return {
        **_shares("accuracy", [each.is_greedy for each in likelihoods]),
        "perplexity": perplexity(total / num_tokens),
        "perplexity_per_row": perplexity(total / len(likelihoods)),
    }


def grade_answers(questions: Sequence[Question], texts: Sequence[str], pattern: str | None) -> dict[str, float]:
    """Metrics of exact match; `num_unanswered` counts texts in which the pattern finds nothing."""
    answers = [find_answer(text, pattern) for text in texts]
    references = [_reference(question, pattern) for question in questions]
    right = [
        answer is not None and is_same(answer, reference) for answer, reference in zip(answers, references, strict=True)
    ]
    return {**_shares("accuracy", right), "num_unanswered": sum(answer is None for answer in answers)}


def find_answer(text: str, pattern: str | None) -> str | None:
    """The answer in a generated text: the pattern's first match (its first group, if it has one), without a pattern
    the first line that is not blank; None if there is none."""
    if pattern is None:
        return next((line.strip() for line in text.splitlines() if line.strip()), None)
    match = re.search(pattern, text)
    if match is None:
        return None
    return match[1] if match.re.groups else match[0]


def is_same(answer: str, reference: str) -> bool:
    """Equal but for blanks; numbers by value: `1,200`, `$1200` and `1200.0` are the same."""
    answer, reference = " ".join(answer.split()), " ".join(reference.split())
    if answer == reference:
        return True
    left, right = _number(answer), _number(reference)
    return left is not None and left == right


def _reference(question: Question, pattern: str | None) -> str:
    """The reference may be a whole worked answer, in which the pattern finds the result; else it is the result."""
    found = None if pattern is None else find_answer(question.reference, pattern)
    return question.reference if found is None else found


def _number(text: str) -> float | None:
    if not _NUMBER.fullmatch(text):
        return None
    return float(re.sub(r"[$€£,%]", "", text).rstrip("."))


def _shares(name: str, right: Sequence[bool]) -> dict[str, float]:
    """The share of `right`, and its standard error as of a sample (n - 1)."""
    share = sum(right) / len(right)
    stderr = math.sqrt(share * (1 - share) / (len(right) - 1)) if len(right) > 1 else math.nan
    return {name: share, f"{name}_stderr": stderr}
