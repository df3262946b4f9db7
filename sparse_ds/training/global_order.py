"""The order in which training samples are seen: the same for every world size.

    permutation of epoch e    cut to a whole number of global batches
    | step 0: G samples | step 1: G samples | ...            G = micro_batch_size * accumulation * ranks

accelerate deals micro batches round-robin to the ranks, so with the same G every step sees the same samples on any
number of ranks. The up to G - 1 samples at the end of an epoch's permutation wait for another epoch's.

Packed samples (`data.packing`): ordered and counted are rows, which were made from the permutation of epoch 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from sparse_ds.config.errors import UserError


def epoch_permutation(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of all samples in one epoch: int64 [num_samples]."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_samples, generator=generator)


class GlobalOrderSampler(Sampler[int]):
    """A seeded permutation of the samples, a new one each epoch.

    Args:
        num_samples: samples (or packed rows) in the training data.
        global_batch_size: samples of one optimizer step over all ranks.
        seed: of the run.
        unit: what is counted, for the message.

    Raises:
        UserError: fewer samples than one global batch.
    """

    def __init__(self, num_samples: int, global_batch_size: int, seed: int, unit: str = "usable samples") -> None:
        if num_samples < global_batch_size:
            raise UserError(
                f"data.train: got {num_samples} {unit}, expected at least one global batch of "
                f"{global_batch_size}. Give more data or lower train.global_batch_size, train.micro_batch_size or "
                "train.gradient_accumulation_steps."
            )
        self.num_samples, self.seed, self.epoch = num_samples, seed, 0
        self._length = num_samples // global_batch_size * global_batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        permutation = epoch_permutation(self.num_samples, self.seed, self.epoch)
        yield from permutation[: self._length].tolist()
