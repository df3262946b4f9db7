"""Types of the fixtures here, and a stand-in for partitioned parameters: a model is built without a process group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.base_tensors import BaseSettings, check_base, list_base_tensors
from sparse_ds.model.loading import load_base
from sparse_ds.sparse.layout import SparseLayout

MakeCheckpoint = Callable[..., Path]
EditTensors = Callable[[dict[str, Tensor]], Any]


class WholeParameters:
    """Stands in for `PartitionedParameters` with one rank that holds everything at all times."""

    def make(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        fill: Callable[[Tensor, int], None] | None = None,
        *,
        requires_grad: bool,
    ) -> Parameter:
        flat = torch.zeros(torch.Size(shape).numel(), dtype=dtype)
        if fill is not None:
            fill(flat, 0)
        parameter: Any = Parameter(flat.view(shape), requires_grad=requires_grad)
        # What `zero3_partitions` reads; the partition and the parameter share their memory.
        parameter.ds_tensor, parameter.ds_numel, parameter.ds_zero_partition_rank = flat, flat.numel(), 0
        parameter.ds_tensor.ds_numel = flat.numel()
        return parameter


def load(
    checkpoint: BaseCheckpoint,
    model: PreTrainedModel,
    layouts: dict[str, SparseLayout],
    base: BaseSettings,
    build: Callable[[], dict[str, dict[str, Parameter]]],
) -> None:
    """Check, build and load, as a run does."""
    tensors = list_base_tensors(model, layouts, base)
    copies = check_base(checkpoint, tensors, model)
    made = build()
    tensors = [replace(tensor, parameters=made[tensor.name]) for tensor in tensors]
    load_base(checkpoint, tensors, torch.device("cpu"), tied_copies=copies)
