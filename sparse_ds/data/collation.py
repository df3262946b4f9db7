"""Samples of different lengths to one rectangular micro batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DataCollatorWithFlattening

from sparse_ds.config.errors import UserError
from sparse_ds.data.tokenization import IGNORED_LABEL


@dataclass(frozen=True, slots=True)
class CausalCollator:
    """Pads on the right, and masks by length, so that the pad token may be the EOS token.

    EOS as the last token of a sample is attended to and learned; the same id as padding behind it is neither.

    Args:
        pad_token_id: what to fill `input_ids` with; never attended to, so any id of the vocabulary will do.
        pad_to_multiple_of: T is the longest sample's length rounded up to this (8 keeps matrix units busy).
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of < 1:
            raise UserError(f"pad_to_multiple_of is {self.pad_to_multiple_of}, expected at least 1.")

    def __call__(self, samples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Collate B samples with `input_ids` and `labels`.

        Returns:
            `input_ids`, `attention_mask` (1 on the sample, 0 on padding) and `labels` (-100 on padding), each int64
            [B, T] on the CPU.
        """
        input_ids_BT, attention_mask_BT = _pad(samples, self.pad_token_id, self.pad_to_multiple_of)
        labels_BT = torch.full(input_ids_BT.shape, IGNORED_LABEL, dtype=torch.int64)
        for position, sample in enumerate(samples):
            length = len(sample["input_ids"])
            labels_BT[position, :length] = torch.as_tensor(sample["labels"], dtype=torch.int64)
        return {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "labels": labels_BT}


@dataclass(frozen=True, slots=True)
class PackedCollator:
    """Rows of several samples, such that nothing of one sample reaches another.

        input_ids      7 8 9 4 5 2 2 2        two samples, and padding
        position_ids   0 1 2 0 1 0 1 2        begin anew with every sample; the padding counts as one more
        labels         . 8 9 . 5 . . .        . is -100: the last token of a sample does not predict the next sample's

    There is no attention mask, by which transformers knows that position ids that begin anew bound the samples
    (`masking_utils.find_packed_sequence_indices`): its eager and sdpa attention get a causal mask in blocks, with
    sliding windows too. Its flash attention does so for micro batches of one row only, and would let the samples of
    larger ones see each other. So for flash attention all rows of the micro batch are joined into one without padding,
    with the bounds of the samples beside them (`DataCollatorWithFlattening`).

    Args:
        pad_token_id: what to fill `input_ids` with.
        joins_rows: make one row of the micro batch, for flash attention.
        pad_to_multiple_of: as for `CausalCollator`; without effect on joined rows.
    """

    pad_token_id: int
    joins_rows: bool = False
    pad_to_multiple_of: int = 8

    def __call__(self, rows: Sequence[Mapping[str, Sequence[Sequence[int]]]]) -> dict[str, Any]:
        """Collate B rows with the `input_ids` and `labels` of their samples.

        Returns:
            `input_ids`, `position_ids` and `labels`, each int64 [B, T] on the CPU; `sample_lengths`, int64 [samples],
            for whoever counts: no input of the model. Joined rows: [1, T] with the tokens of all rows, and
            `cu_seq_lens_q`, `cu_seq_lens_k` (int32 [samples + 1]), `max_length_q`, `max_length_k` (int).
        """
        sample_lengths = torch.tensor([len(ids) for row in rows for ids in row["input_ids"]])
        if self.joins_rows:
            samples = [
                {"input_ids": ids, "labels": labels}
                for row in rows
                for ids, labels in zip(row["input_ids"], row["labels"], strict=True)
            ]
            joined = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(samples, return_tensors="pt")
            return {**joined, "sample_lengths": sample_lengths}
        joined_rows = [{"input_ids": [token for ids in row["input_ids"] for token in ids]} for row in rows]
        input_ids_BT, _ = _pad(joined_rows, self.pad_token_id, self.pad_to_multiple_of)
        position_ids_BT, labels_BT = torch.zeros_like(input_ids_BT), torch.full_like(input_ids_BT, IGNORED_LABEL)
        for number, row in enumerate(rows):
            start = 0
            for labels in row["labels"]:
                end = start + len(labels)
                position_ids_BT[number, start:end] = torch.arange(len(labels))
                labels_BT[number, start + 1 : end] = torch.as_tensor(labels[1:], dtype=torch.int64)
                start = end
            position_ids_BT[number, start:] = torch.arange(input_ids_BT.shape[1] - start)
        return {
            "input_ids": input_ids_BT,
            "position_ids": position_ids_BT,
            "labels": labels_BT,
            "sample_lengths": sample_lengths,
        }


@dataclass(frozen=True, slots=True)
class ClassificationCollator:
    """Pads on the right; one label per sample.

    Args:
        pad_token_id: the `pad_token_id` of the model: transformers' classifiers read the last token that is not it.
        pad_to_multiple_of: as for `CausalCollator`.
        max_tokens: T is never more: the model has no further positions; None: no limit.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8
    max_tokens: int | None = None

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate B samples with `input_ids` and `label`, and perhaps `token_type_ids`.

        Returns:
            `input_ids` and `attention_mask` (1 on the sample, 0 on padding), int64 [B, T]; `labels`, int64 [B];
            `token_type_ids` (0 on padding), int64 [B, T], where the samples have them.
        """
        input_ids_BT, attention_mask_BT = _pad(samples, self.pad_token_id, self.pad_to_multiple_of)
        labels_B = torch.tensor([sample["label"] for sample in samples], dtype=torch.int64)
        batch = {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT}
        if "token_type_ids" in samples[0]:
            batch["token_type_ids"] = torch.zeros_like(input_ids_BT)
            for position, sample in enumerate(samples):
                types = torch.as_tensor(sample["token_type_ids"], dtype=torch.int64)
                batch["token_type_ids"][position, : len(types)] = types
        if self.max_tokens is not None:
            batch = {name: tensor_BT[:, : self.max_tokens] for name, tensor_BT in batch.items()}
        return {**batch, "labels": labels_B}


def _pad(samples: Sequence[Mapping[str, Any]], pad_token_id: int, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(input ids, attention mask), int64 [B, T]."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    shape = (len(samples), -(-longest // multiple) * multiple)
    input_ids_BT = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask_BT = torch.zeros(shape, dtype=torch.int64)
    for position, sample in enumerate(samples):
        length = len(sample["input_ids"])
        input_ids_BT[position, :length] = torch.as_tensor(sample["input_ids"], dtype=torch.int64)
        attention_mask_BT[position, :length] = 1
    return input_ids_BT, attention_mask_BT
