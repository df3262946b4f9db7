"""The frozen base stays as it was loaded, bit for bit.

A layer puts its deltas into the gathered base for the time of a product and restores it; the engine casts, gathers and
releases. A slip anywhere there would train another model, silently. So every rank takes a checksum of its partitions
of the base once after loading, and compares

    after the engine is made   dtypes: an engine that was not told otherwise casts fp32 statistics to its own dtype
    after the first step       checksums
    after the last step        checksums
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_ds.distributed.process_group import agreement
from sparse_ds.distributed.zero3_partitions import local_partition

CHUNK_BYTES = 2**22
"""A checksum needs about six times as much transient memory (int64 words, factors and products)."""


def checksum(tensor: Tensor) -> int:
    """A number that tells whether `tensor` has changed: sum of (word i) * (2 i + 1) mod 2^64 over its 32-bit words.

    One changed word always changes it, since odd numbers are invertible mod 2^64.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for begin in range(0, data.numel(), CHUNK_BYTES):
        chunk = data[begin : begin + CHUNK_BYTES]
        if chunk.numel() % 4 or chunk.storage_offset() % 4:
            chunk = torch.nn.functional.pad(chunk, (0, -chunk.numel() % 4))
        words = chunk.view(torch.int32).to(torch.int64)
        first = begin // 4
        factors = torch.arange(first, first + words.numel(), dtype=torch.int64, device=data.device)
        total += (words * (factors * 2 + 1)).sum()
    return int(total)


class BaseGuard(TrainerCallback):
    """See the module docstring.

    Args:
        frozen: the parameters of the base by name, just loaded.
    """

    def __init__(self, frozen: Mapping[str, Parameter]) -> None:
        self._frozen = dict(frozen)
        self._dtypes = {name: parameter.ds_tensor.dtype for name, parameter in self._frozen.items()}
        self._checksums = {name: checksum(local_partition(parameter)) for name, parameter in self._frozen.items()}
        self._was_compared = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with agreement("comparing the frozen base with what was loaded"):
            for name, parameter in self._frozen.items():
                found = parameter.ds_tensor.dtype, parameter.dtype
                if set(found) != {self._dtypes[name]}:
                    raise RuntimeError(
                        f"the engine changed the dtype of {name} from {self._dtypes[name]} to {found[0]}: this version "
                        "of DeepSpeed cannot hold this base"
                    )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._was_compared:
            self._was_compared = True
            self._compare(f"in step {state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._compare(f"in the steps up to {state.global_step}")

    def _compare(self, when: str) -> None:
        """Collectives: an agreement; every rank must call it."""
        with agreement("comparing the frozen base with what was loaded"):
            changed = [
                name
                for name, parameter in self._frozen.items()
                if checksum(local_partition(parameter)) != self._checksums[name]
            ]
            if changed:
                raise RuntimeError(
                    f"the frozen base changed {when}: {', '.join(changed[:5])} ({len(changed)} in all). This is a "
                    "defect or a hardware fault; the run stops because its results would be wrong."
                )
