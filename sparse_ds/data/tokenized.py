"""One source, tokenized: the samples, and what was counted on the way."""

from __future__ import annotations

from dataclasses import dataclass

from datasets import Dataset

from sparse_ds.data.sample_prompts import SamplePrompt


@dataclass(frozen=True)
class TokenizedData:
    """One source, tokenized.

    Attributes:
        dataset: columns `input_ids` and `labels` (lists of int32 of the same length), or `input_ids` and `label` (int)
            for a classification, in the order of the source.
        source: what was read, as messages show it.
        format_name: as in `data.format`.
        is_detected: the format was detected, not asked for.
        num_tokens: all tokens.
        num_trained_tokens: tokens that the loss counts; for a classification: samples.
        num_truncated: samples kept that lost their end to `sequence_length`.
        num_dropped: rows left out because they could not be used.
        sample_prompts: the prompts of the first samples; none for a classification.
        labels: of a classification, in the order of their numbers; else None.
        dropped_rows: rows of the source that were left out, ascending, counted from 0.
        left_out: how many rows were left out, and why the first of them; None for none.
    """

    dataset: Dataset
    source: str
    format_name: str
    is_detected: bool
    num_tokens: int
    num_trained_tokens: int
    num_truncated: int
    num_dropped: int
    sample_prompts: list[SamplePrompt]
    labels: tuple[str, ...] | None = None
    dropped_rows: tuple[int, ...] = ()
    left_out: str | None = None

    def row_of(self, sample: int) -> int | str:
        """The row of the source from which a sample of `dataset` was made, both counted from 0; as text where a number
        does not say which source."""
        row = sample
        for dropped in self.dropped_rows:
            if dropped > row:
                break
            row += 1
        return row

    def describe(self) -> str:
        """One line for the start of a run."""
        how = "detected" if self.is_detected else "as configured"
        if self.labels is not None:
            return (
                f"{self.source}: {len(self.dataset):,} samples of {len(self.labels)} labels, format {self.format_name} "
                f"({how}), {self.num_tokens:,} tokens"
            )
        tokens = self._describe_tokens()
        return f"{self.source}: {len(self.dataset):,} samples, format {self.format_name} ({how}), {tokens}"

    def _describe_tokens(self) -> str:
        share = self.num_trained_tokens / self.num_tokens
        return f"{self.num_tokens:,} tokens, {self.num_trained_tokens:,} of them trained ({share:.0%})"
