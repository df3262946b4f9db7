"""What the Trainer takes as its samples: one sample each, or packed rows of several; and their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from sparse_ds.config import RunConfig
from sparse_ds.data import DataBundle, PackedCollator
from sparse_ds.data.fingerprint import dataset_fingerprint
from sparse_ds.data.packing import PackedDataset
from sparse_ds.data.streaming import StreamedDataset
from sparse_ds.training.global_order import GlobalOrderSampler, epoch_permutation
from sparse_ds.training.stream_order import make_sampler


@dataclass(frozen=True)
class TrainingRows:
    """The training data as the steps see it.

    Attributes:
        dataset: one row per item.
        collate: makes micro batches of rows.
        sampler: their order.
        data: the samples of which the rows are made.
    """

    dataset: Dataset | StreamedDataset | PackedDataset
    collate: Callable[[Any], dict[str, Any]]
    sampler: GlobalOrderSampler
    data: DataBundle

    def fingerprint(self) -> str:
        """sha256 of all rows."""
        if isinstance(self.dataset, PackedDataset):
            return self.dataset.fingerprint()
        return dataset_fingerprint(self.dataset)

    def source_rows(self, rows: list[int]) -> list[int | str]:
        """The rows of `data.train`, counted from 0 as in its source or as text, of which these rows are made."""
        if isinstance(self.dataset, PackedDataset):
            rows = [sample for row in rows for sample in self.dataset.packing.samples_of(row)]
        return [self.data.train_data.row_of(sample) for sample in rows]


def order_rows(config: RunConfig, data: DataBundle, global_batch_size: int) -> TrainingRows:
    """Pack the samples if the run asks for it, and order them. Collectives: none; every rank gets the same.

    Raises:
        UserError: fewer rows than one global batch.
    """
    seed = config.train.seed
    if not config.data.packing:
        sampler = make_sampler(data.train, global_batch_size, seed)
        return TrainingRows(data.train, data.collator, sampler, data)
    assert isinstance(data.train, Dataset)
    order = epoch_permutation(len(data.train), seed, epoch=0).numpy()
    packed = PackedDataset(data.train, config.data.sequence_length, order)
    is_flash = config.model.attention == "flash_attention_2"
    collate = PackedCollator(data.collator.pad_token_id, joins_rows=is_flash)
    sampler = GlobalOrderSampler(len(packed), global_batch_size, seed, unit="packed rows")
    return TrainingRows(packed, collate, sampler, data)
