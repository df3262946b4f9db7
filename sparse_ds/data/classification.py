"""Labeled texts to token ids and numbers of labels: `labeled_texts` makes the ids.

label   = position in the list of labels
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
from sparse_ds.data.labeled_texts import LabeledTextEncoder
from sparse_ds.data.reading import Row
from sparse_ds.data.samples import LabeledText
from sparse_ds.data.sources import RowSource, TextSource

_CHUNK_SAMPLES = 1000
_SHOWN_LABELS = 20
_COLUMN = List(Value("int32"))


@dataclass(frozen=True)
class LabeledData:
    """One source, tokenized.

    Attributes:
        dataset: columns `input_ids` (lists of int32), `token_type_ids` where the model has them, and `label` (int32),
            in the order of the source.
        labels: the text of every label; `label` counts from 0 in this order.
        num_tokens: all tokens.
        num_truncated: samples that lost a part to `sequence_length`.
    """

    dataset: Dataset
    labels: tuple[str, ...]
    num_tokens: int
    num_truncated: int


def tokenize_labeled(
    source: RowSource | TextSource,
    encoder: LabeledTextEncoder,
    *,
    labels: Sequence[str] | None,
    max_samples: int | None,
    bad_rows: BadRows,
    show_progress: bool,
    truncate: bool = True,
) -> LabeledData:
    """Read and tokenize one source of labeled texts.

    Args:
        source: rows with a text and a label.
        encoder: makes the ids.
        labels: all labels, in order; None: those of the source, sorted (by number where all are whole numbers).
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
        kept = []
        for (number, sample), one in zip(batch, encoder.encode([sample for _, sample in batch]), strict=True):
            if isinstance(one, UserError):
                bad_rows.refuse(number, one)
            elif one.is_truncated and not truncate:
                bad_rows.refuse(number, _too_long(sample, encoder.sequence_length))
            else:
                kept.append(one)
                texts.append(sample.label)
            if len(texts) == max_samples:
                break
        num_truncated += sum(one.is_truncated for one in kept)
        num_tokens += sum(len(one.input_ids) for one in kept)
        columns = {"input_ids": [one.input_ids for one in kept]}
        if encoder.has_token_types:
            columns["token_type_ids"] = [one.token_type_ids for one in kept]
        chunks.append(Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, _COLUMN))))
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


def _too_long(sample: LabeledText, sequence_length: int) -> UserError:
    return UserError(
        f"{sample.location}: the sample is longer than data.sequence_length = {sequence_length} tokens. Raise it, "
        "shorten the sample, or set data.truncate to true."
    )


def _sorted(labels: set[str]) -> list[str]:
    are_integers = all(label.removeprefix("-").isdecimal() for label in labels)
    return sorted(labels, key=lambda label: (int(label), label)) if are_integers else sorted(labels)
