"""The `summary` record: one run in one line of metrics.jsonl."""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any


def perplexity(loss: float) -> float:
    """exp of a mean loss per token, in nats; infinite where that is too large for a number."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class RunSummary:
    """What a finished run reports. A field is None where the run has nothing to say (no held-out data, no adapter)."""

    heldout_loss_before: float | None
    """Mean loss per token (per sample of a classification) on `data.eval` before the first step."""
    heldout_loss_after: float | None
    num_trained_weights: int
    num_weights: int
    """All weights of the model, frozen ones included; tied ones once."""
    num_steps: int
    wall_s: float
    """Of the training steps, without loading, evaluation and export."""
    tokens_per_second: float
    """Over all ranks."""
    peak_memory_gib: float
    """Of the rank with the highest peak."""
    index_hash: str | None
    sample_prompt: str | None
    sample_answer_before: str | None
    sample_answer_after: str | None
    reference_answer: str | None
    adapter_dir: str | None
    merged_dir: str | None
    heldout_scores_before: dict[str, float] | None = None
    """Of a classification on `data.eval` before the first step: `accuracy`, `f1` (of two labels), `f1_macro`,
    `matthews`."""
    heldout_scores_after: dict[str, float] | None = None
    num_skipped_steps: int = 0
    """Of `num_steps`: those whose loss or gradient was not finite."""
    tflops_per_rank: float | None = None
    """10^12 operations a second that the training's tokens need (`model.flops`)."""
    mfu: float | None = None
    """`tflops_per_rank` as a share of the peak of one device; None where that is not known."""
    hfu: float | None = None
    """The same with what activation checkpointing does once more."""
    tasks: list[dict[str, Any]] | None = None
    """A record per entry of `data.tasks`: `task` (its name), `num_samples`, `accuracy_before`, `accuracy_after`, and
    `chance`, the accuracy of guessing."""

    @property
    def trained_fraction(self) -> float:
        """Trained weights / all weights (0 to 1)."""
        return self.num_trained_weights / self.num_weights

    @property
    def heldout_accuracy_before(self) -> float | None:
        """Share of `data.eval` that a classification gets right before the first step."""
        return (self.heldout_scores_before or {}).get("accuracy")

    @property
    def heldout_accuracy_after(self) -> float | None:
        """As `heldout_accuracy_before`."""
        return (self.heldout_scores_after or {}).get("accuracy")

    @property
    def heldout_perplexity_before(self) -> float | None:
        """exp(held-out loss) of a language model; None for a classification."""
        return self._perplexity(self.heldout_loss_before)

    @property
    def heldout_perplexity_after(self) -> float | None:
        """As `heldout_perplexity_before`."""
        return self._perplexity(self.heldout_loss_after)

    def _perplexity(self, loss: float | None) -> float | None:
        is_classification = self.heldout_accuracy_before is not None or self.heldout_accuracy_after is not None
        return None if loss is None or is_classification else perplexity(loss)

    def to_record(self) -> dict[str, Any]:
        """The fields, `trained_fraction`, the accuracies and the perplexities."""
        derived = (
            "trained_fraction",
            "heldout_accuracy_before",
            "heldout_accuracy_after",
            "heldout_perplexity_before",
            "heldout_perplexity_after",
        )
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> RunSummary:
        """Of a record read from metrics.jsonl; a number that was not finite comes back as NaN.

        Raises:
            KeyError: a field is missing.
        """
        given = [field.name for field in fields(cls) if field.name in record or field.default is MISSING]
        values = {name: record[name] for name in given}
        for when in ("before", "after"):
            # Of a run before there were other scores.
            if f"heldout_scores_{when}" not in record and record.get(f"heldout_accuracy_{when}") is not None:
                values[f"heldout_scores_{when}"] = {"accuracy": record[f"heldout_accuracy_{when}"]}
        for name in record.get("non_finite", {}):
            if name in values:
                values[name] = float(record["non_finite"][name])
        return cls(**values)
