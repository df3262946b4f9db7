"""Samples of different lengths to one rectangular micro batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

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
