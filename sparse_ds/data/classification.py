"""Labeled texts to token ids and numbers of labels.

    ids     = BOS? + ids(text), cut at the end to `sequence_length`, without pad tokens at its end      no EOS
    label   = position in the list of labels

transformers' classifiers read the last token that is not `pad_token_id`, and know nothing of the attention mask. A text
may end with that token itself where the EOS token (or the unknown token) pads. Such tokens at the end are taken away
here, so that the last token of every sample is the one that is read, in training as in plain transformers later, which
cannot tell them from padding: attention is causal, so what follows the token that is read changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.utils import tqdm

from sparse_ds.config.errors import UserError
from sparse_ds.data.bad_rows import BadRows
from sparse_ds.data.formats import labeled_sample
from sparse_ds.data.reading import Row
from sparse_ds.data.samples import LabeledText
from sparse_ds.data.sources import RowSource, TextSource
from sparse_ds.data.tokenization import SampleEncoder

_CHUNK_SAMPLES = 1000
_SHOWN_LABELS = 20
_FEATURES = Features({"input_ids": List(Value("int32"))})


@dataclass(frozen=True)
class LabeledData:
    """One source, tokenized.

    Attributes:
        dataset: columns `input_ids` (lists of int32) and `label` (int32), in the order of the source.
        labels: the text of every label; `label` counts from 0 in this order.
        num_tokens: all tokens.
        num_truncated: samples that lost their end to `sequence_length`.
    """

    dataset: Dataset
    labels: tuple[str, ...]
    num_tokens: int
    num_truncated: int


def tokenize_labeled(
    source: RowSource | TextSource,
    encoder: SampleEncoder,
    *,
    labels: Sequence[str] | None,
    pad_token_id: int,
    max_samples: int | None,
    bad_rows: BadRows,
    show_progress: bool,
    truncate: bool = True,
) -> LabeledData:
    """Read and tokenize one source of labeled texts.

    Args:
        source: rows with a text and a label.
        encoder: the model's tokenizer and the longest sample.
        labels: all labels, in order; None: those of the source, sorted (by number where all are whole numbers).
        pad_token_id: taken away at the end of a sample.
        max_samples: stop after so many; None reads all.
        bad_rows: takes rows without text or label, or with a label that is not in the list.
        show_progress: show a progress bar.
        truncate: cut longer samples at the end; false: they are bad rows.

    Raises:
        UserError: no rows, a bad row, fewer than two labels.
    """
    field = bad_rows.field
    if isinstance(source, TextSource):
        raise UserError(f"{field}: {source.name} is running text, which has no labels. Give a file with rows.")
    texts: list[str] = []
    chunks: list[Dataset] = []
    num_tokens = num_truncated = 0

    def to_sample(row: Row) -> LabeledText:
        sample = labeled_sample(row)
        if labels is not None:
            _check_label(sample, labels, field)
        return sample

    rows = tqdm(source.with_broken(), desc=f"tokenizing {field}", unit=" samples", disable=not show_progress, delay=1)
    samples = bad_rows.convert(rows, to_sample)
    while batch := list(islice(samples, _CHUNK_SAMPLES if max_samples is None else min(_CHUNK_SAMPLES, max_samples))):
        kept: list[list[int]] = []
        for (number, sample), ids in zip(batch, encoder.plain_ids([sample.text for _, sample in batch]), strict=True):
            is_truncated = len(ids) > encoder.sequence_length
            ids = _without_end_padding(ids[: encoder.sequence_length], pad_token_id)
            if not ids or (is_truncated and not truncate):
                bad_rows.refuse(number, _unusable(sample, encoder.sequence_length, is_truncated))
                continue
            num_truncated += is_truncated
            kept.append(ids)
            texts.append(sample.label)
            if len(texts) == max_samples:
                break
        num_tokens += sum(map(len, kept))
        chunks.append(Dataset.from_dict({"input_ids": kept}, features=_FEATURES))
        if len(texts) == max_samples:
            break
    if not texts:
        raise UserError(f"{field}: no usable sample in {source.name}: {bad_rows.describe(0) or 'it holds none.'}")
    known = tuple(_sorted(set(texts)) if labels is None else labels)
    if len(known) < 2:
        raise UserError(
            f"{field}: all samples of {source.name} have the label {known[0]!r}; expected at least 2 labels. Give data "
            "with all labels, or name them in data.labels."
        )
    number_of = {label: number for number, label in enumerate(known)}
    numbers = [number_of[text] for text in texts]
    dataset = concatenate_datasets(chunks).add_column("label", numbers)
    return LabeledData(dataset, known, num_tokens, num_truncated)


def _check_label(sample: LabeledText, labels: Sequence[str], field: str) -> None:
    origin = "data.labels" if field == "data.train" else "data.labels, or the labels of data.train"
    if sample.label not in labels:
        shown = ", ".join(map(repr, labels[:_SHOWN_LABELS])) + (", ..." if len(labels) > _SHOWN_LABELS else "")
        raise UserError(
            f'{sample.location}: field "label" is {sample.label!r}, expected one of {shown} ({origin}). Correct '
            "it, or name all labels in data.labels."
        )


def _unusable(sample: LabeledText, sequence_length: int, is_truncated: bool) -> UserError:
    if is_truncated:
        return UserError(
            f"{sample.location}: the sample is longer than data.sequence_length = {sequence_length} tokens. Raise it, "
            "shorten the sample, or set data.truncate to true."
        )
    return UserError(f"{sample.location}: the tokenizer makes no token of the text. Remove the sample.")


def _without_end_padding(ids: list[int], pad_token_id: int) -> list[int]:
    """`ids` up to the last one that is no pad token, one id at least."""
    length = len(ids)
    while length > 1 and ids[length - 1] == pad_token_id:
        length -= 1
    return ids[:length]


def _sorted(labels: set[str]) -> list[str]:
    are_integers = all(label.removeprefix("-").isdecimal() for label in labels)
    return sorted(labels, key=lambda label: (int(label), label)) if are_integers else sorted(labels)
