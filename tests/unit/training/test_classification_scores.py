"""Scores from counts, against formulas of another kind: the confusion matrix, and correlation of one-hot vectors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics
from torch import Tensor

from sparse_ds.training.classification_scores import LabelCounts, scores_of


def scores(predicted: Tensor, actual: Tensor, num_labels: int, num_parts: int) -> dict[str, float]:
    """As a run computes them: batches counted apart, their numbers added."""
    total = [0.0] * (3 * num_labels)
    for guessed, labels in zip(predicted.chunk(num_parts), actual.chunk(num_parts), strict=True):
        counts = LabelCounts(num_labels)
        counts.add(torch.nn.functional.one_hot(guessed, num_labels).float(), labels)
        total = [left + right for left, right in zip(total, counts.numbers(), strict=True)]
    return scores_of(total)


def expected_scores(predicted: Tensor, actual: Tensor, num_labels: int) -> dict[str, float]:
    """From the confusion matrix [actual, predicted]; Matthews as the correlation of one-hot matrices."""
    confusion = torch.zeros(num_labels, num_labels, dtype=torch.float64)
    for label, guess in zip(actual.tolist(), predicted.tolist(), strict=True):
        confusion[label, guess] += 1
    f1 = []
    for label in range(num_labels):
        hits = float(confusion[label, label])
        precision = hits / max(float(confusion[:, label].sum()), 1.0)
        recall = hits / max(float(confusion[label].sum()), 1.0)
        f1.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    occur = [label for label in range(num_labels) if confusion[label].sum() + confusion[:, label].sum() > 0]
    ones = [torch.nn.functional.one_hot(x, num_labels).double() for x in (predicted, actual)]
    left, right = (x - x.mean(0) for x in ones)
    root = math.sqrt(float((left * left).sum()) * float((right * right).sum()))
    return {
        "accuracy": float(confusion.trace() / confusion.sum()),
        **({"f1": f1[1]} if num_labels == 2 else {}),
        "f1_macro": sum(f1[label] for label in occur) / len(occur),
        "matthews": float((left * right).sum()) / root if root > 1e-12 else 0.0,
    }


@given(st.data(), st.integers(2, 5), st.integers(1, 40), st.integers(1, 4))
def test_scores_are_those_of_all_samples_at_once(data: Any, num_labels: int, count: int, num_parts: int) -> None:
    labels = st.lists(st.integers(0, num_labels - 1), min_size=count, max_size=count)
    predicted, actual = torch.tensor(data.draw(labels)), torch.tensor(data.draw(labels))
    num_parts = len(predicted.chunk(num_parts))
    found = scores(predicted, actual, num_labels, num_parts)
    assert found == pytest.approx(expected_scores(predicted, actual, num_labels), abs=1e-12)


@given(st.data(), st.integers(2, 5), st.integers(1, 40))
def test_scores_are_those_of_scikit_learn(data: Any, num_labels: int, count: int) -> None:
    labels = st.lists(st.integers(0, num_labels - 1), min_size=count, max_size=count)
    predicted, actual = data.draw(labels), data.draw(labels)
    found = scores(torch.tensor(predicted), torch.tensor(actual), num_labels, 1)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(actual, predicted))
    assert found["f1_macro"] == pytest.approx(metrics.f1_score(actual, predicted, average="macro", zero_division=0))
    assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(actual, predicted), abs=1e-12)
    if num_labels == 2:
        assert found["f1"] == pytest.approx(metrics.f1_score(actual, predicted, zero_division=0))


def test_the_majority_class_scores_nothing() -> None:
    actual = torch.tensor([1] * 7 + [0] * 3)
    found = scores(torch.ones(10, dtype=torch.int64), actual, 2, 1)
    assert found == pytest.approx({"accuracy": 0.7, "f1": 14 / 17, "f1_macro": 7 / 17, "matthews": 0.0})


def test_of_equal_logits_the_first_is_taken() -> None:
    counts = LabelCounts(3)
    counts.add(torch.zeros(4, 3), torch.tensor([0, 0, 1, 2]))
    assert counts.numbers() == [2, 0, 0, 4, 0, 0, 2, 1, 1]
