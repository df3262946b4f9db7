"""Accuracy, F1 and Matthews' correlation of a classification, from three counts per label.

Of S samples and L labels, with r_k, p_k, a_k the samples of label k that are right, predicted as k, actually k:

    accuracy     R / S                          R = sum r_k
    F1 of k      2 r_k / (p_k + a_k)
    f1           of the second of two labels (the positive one)
    f1_macro     mean over the labels that occur among actual or predicted ones
    matthews     (R S - sum p_k a_k) / sqrt((S^2 - sum p_k^2) (S^2 - sum a_k^2))      0 where the root is 0

Counts are sums, so those of batches and ranks can be added, and the scores are those of all samples at once. They are
the definitions of scikit-learn (Matthews for L > 2: Gorodkin 2004, "Comparing two K-category assignments by a
K-category correlation coefficient").
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SCORES = ("accuracy", "f1", "f1_macro", "matthews")
"""All that there may be, see above."""


class LabelCounts:
    """Counts of L labels."""

    def __init__(self, num_labels: int) -> None:
        self._counts_3L = torch.zeros(3, num_labels, dtype=torch.int64)

    def add(self, logits_BL: Tensor, labels_B: Tensor) -> None:
        """One batch; predicted is the label of the largest logit, of equal ones the first."""
        num_labels = self._counts_3L.shape[1]
        predicted_B, actual_B = logits_BL.argmax(-1).cpu(), labels_B.cpu()
        right_B = actual_B[predicted_B == actual_B]
        self._counts_3L += torch.stack(
            [torch.bincount(kind, minlength=num_labels) for kind in (right_B, predicted_B, actual_B)]
        )

    def numbers(self) -> list[float]:
        """3 L numbers that may be added to those of others: right, predicted, actual."""
        return [float(count) for count in self._counts_3L.flatten()]


def scores_of(numbers: Sequence[float]) -> dict[str, float]:
    """Name -> score, from `LabelCounts.numbers` or a sum of such.

    Returns:
        `accuracy` (0 to 1), for two labels `f1` (0 to 1), `f1_macro` (0 to 1), `matthews` (-1 to 1).
    """
    num_labels = len(numbers) // 3
    right, predicted, actual = (numbers[i * num_labels : (i + 1) * num_labels] for i in range(3))
    num_samples, num_right = sum(actual), sum(right)
    by_label = [2 * r / (p + a) for r, p, a in zip(right, predicted, actual, strict=True) if p + a > 0]
    scores = {"accuracy": num_right / num_samples}
    if num_labels == 2:
        scores["f1"] = 2 * right[1] / (predicted[1] + actual[1]) if predicted[1] + actual[1] > 0 else 0.0
    scores["f1_macro"] = sum(by_label) / len(by_label)
    spread = (num_samples**2 - sum(p * p for p in predicted)) * (num_samples**2 - sum(a * a for a in actual))
    covariance = num_right * num_samples - sum(p * a for p, a in zip(predicted, actual, strict=True))
    scores["matthews"] = covariance / math.sqrt(spread) if spread > 0 else 0.0
    return scores
