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
from sparse_ds.data.formats import LabeledText, labeled_sample
from sparse_ds.data.labeled_texts import LabeledTextEncoder
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
    field: str,
    show_progress: bool,
) -> LabeledData:
    """Read and tokenize one source of labeled texts.

    Args:
        source: rows with a text and a label.
        encoder: makes the ids.
        labels: all labels, in order; None: those of the source, sorted (by number where all are whole numbers).
        max_samples: stop after so many; None reads all.
        field: the config field that the source comes from, for messages.
        show_progress: show a progress bar.

    Raises:
        UserError: no rows, a row without text or label, a label that is not in the list, fewer than two labels.
    """
    if isinstance(source, TextSource):
        raise UserError(f"{field}: {source.name} is running text, which has no labels. Give a file with rows.")
    texts: list[str] = []
    chunks: list[Dataset] = []
    num_tokens = num_truncated = 0
    rows = iter(tqdm(source, desc=f"tokenizing {field}", unit=" samples", disable=not show_progress, delay=1))
    samples = islice((labeled_sample(row) for row in rows), max_samples)
    while batch := list(islice(samples, _CHUNK_SAMPLES)):
        if labels is not None:
            _check_labels(batch, labels, field)
        encoded = []
        for one in encoder.encode(batch):
            if isinstance(one, UserError):
                raise one
            encoded.append(one)
        num_truncated += sum(one.is_truncated for one in encoded)
        num_tokens += sum(len(one.input_ids) for one in encoded)
        texts += [sample.label for sample in batch]
        columns = {"input_ids": [one.input_ids for one in encoded]}
        if encoded[0].token_type_ids:
            columns["token_type_ids"] = [one.token_type_ids for one in encoded]
        chunks.append(Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, _COLUMN))))
    if not chunks:
        raise UserError(f"{field}: {source.name} holds no sample. Give at least one.")
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


def _check_labels(batch: Sequence[LabeledText], labels: Sequence[str], field: str) -> None:
    origin = "data.labels" if field == "data.train" else "data.labels, or the labels of data.train"
    for sample in batch:
        if sample.label not in labels:
            shown = ", ".join(map(repr, labels[:_SHOWN_LABELS])) + (", ..." if len(labels) > _SHOWN_LABELS else "")
            raise UserError(
                f'{sample.location}: field "label" is {sample.label!r}, expected one of {shown} ({origin}). Correct '
                "it, or name all labels in data.labels."
            )


def _sorted(labels: set[str]) -> list[str]:
    are_integers = all(label.removeprefix("-").isdecimal() for label in labels)
    return sorted(labels, key=lambda label: (int(label), label)) if are_integers else sorted(labels)
