"""Types of the fixtures here, and a stand-in for partitioned parameters: a model is built without a process group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

MakeCheckpoint = Callable[..., Path]
EditTensors = Callable[[dict[str, Tensor]], Any]


class WholeParameters:
    """Stands in for `PartitionedParameters` with one rank that holds everything at all times."""

    def make(
        self, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[Tensor, int], None], *, requires_grad: bool
    ) -> Parameter:
        flat = torch.zeros(torch.Size(shape).numel(), dtype=dtype)
        fill(flat, 0)
        return Parameter(flat.view(shape), requires_grad=requires_grad)
