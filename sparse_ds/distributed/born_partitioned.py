"""ZeRO-3 parameters that are born partitioned: the full tensor never has to exist on any rank.

`deepspeed.zero.Init` takes a full tensor on every rank, broadcasts rank 0's and cuts it. Here a rank writes only its
own slice. A ZeRO-3 parameter over R ranks with N elements:

    partition    ceil(N / R) elements on every rank, the last ones padded; rank r owns [r * P, min((r + 1) * P, N))
    param.data   empty while NOT_AVAILABLE; the full tensor while gathered
    param.ds_tensor   the partition, always there

This is DeepSpeed's private interface (verified with 0.19.8; `tests/distributed/test_born_partitioned.py` is the
contract). It is used in this file only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from deepspeed.runtime.zero.partition_parameters import Init, PartitionedParamStatus, ZeroParamStatus
from torch import Tensor
from torch.nn import Parameter

from sparse_ds.distributed.byte_gather import gather_in_one_message

FillPartition = Callable[[Tensor, int], None]
"""`fill(slice, start)` writes elements [start, start + len(slice)) of the flat tensor into the 1-D `slice`."""


def partition_range(num_elements: int, rank: int, world_size: int) -> tuple[int, int]:
    """[start, stop) of the flat elements that `rank` owns of a parameter of `num_elements`; empty ranges start at N."""
    partition_size = -(-num_elements // world_size)
    start = min(rank * partition_size, num_elements)
    return start, min(start + partition_size, num_elements)


class PartitionedParameters:
    """Makes ZeRO-3 parameters from their local slices.

    Args:
        offload_device: where partitions live between steps: "none" (the device of the rank) or "cpu".
        pin_memory: page-locked partitions (with "cpu").
    """

    def __init__(self, *, offload_device: str = "none", pin_memory: bool = False) -> None:
        self._init = Init(remote_device=None if offload_device == "none" else offload_device, pin_memory=pin_memory)

    def make(
        self, shape: tuple[int, ...], dtype: torch.dtype, fill: FillPartition | None = None, *, requires_grad: bool
    ) -> Parameter:
        """One parameter of `shape`, of which this rank holds only its slice; zeros where nothing fills it.

        Memory: the partition. Collectives: none. Every rank must make the same parameters in the same order
        (DeepSpeed numbers them).
        """
        # One element expanded to the shape: it has the right shape and costs nothing.
        placeholder = torch.empty(1, dtype=dtype, device=self._init.local_device).expand(shape)
        parameter = Parameter(placeholder, requires_grad=requires_grad)
        self._init._convert_to_deepspeed_param(parameter)
        num_elements = math.prod(shape)
        rank, world_size = parameter.ds_zero_partition_rank, parameter.ds_zero_partition_world_size
        partition_size = -(-num_elements // world_size)
        # Padding must be defined: uninitialised bytes can be NaN, and norms and flat optimizer steps would see it.
        partition = torch.zeros(partition_size, dtype=dtype, device=self._init.remote_device)
        if self._init.pin_memory:
            partition = partition.pin_memory()
        start, stop = partition_range(num_elements, rank, world_size)
        if fill is not None and stop > start:
            fill(partition.narrow(0, 0, stop - start), start)
        parameter.ds_tensor = partition
        parameter.ds_tensor.ds_numel = partition_size
        parameter.ds_tensor.status = PartitionedParamStatus.AVAILABLE
        parameter.ds_tensor.final_location = None
        parameter.ds_numel_aligned = partition_size * world_size
        parameter.data = torch.empty(0, dtype=dtype, device=self._init.local_device)
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
        gather_in_one_message(parameter)
        return parameter


def slice_of(full: Tensor) -> FillPartition:
    """Fill from a full tensor that is at hand anyway (read, used once, dropped)."""

    def fill(partition: Tensor, start: int) -> None:
        partition.copy_(full.reshape(-1).narrow(0, start, partition.numel()))

    return fill
