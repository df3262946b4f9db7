"""What DeepSpeed fetches together travels in one all-gather, whatever its dtypes.

DeepSpeed's own gather sends one message per dtype: a layer of a sparse model has two to four (base, indices, values,
NF4 statistics). Here the bytes of all partitions lie behind each other:

    a rank's row    [ int64 .. | int32, fp32 .. | bf16 .. | uint8 .. | ]     wide dtypes first, each begins aligned
    sent            R rows, one all-gather, asynchronous

The bytes sent are those of the partitions, plus at most `ALIGNMENT` bytes per dtype and rank.

This is DeepSpeed's private interface (verified with 0.19.8; `tests/distributed/test_born_partitioned.py` and
`tests/distributed/test_communication.py` are the contract). Whatever is not the ordinary case (one tensor, one rank,
quantized or hierarchical partitions, communication in another dtype, NVMe) goes DeepSpeed's own way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import (
    AllGatherCoalescedHandle,
    MultipleAllGatherHandles,
    ZeroParamStatus,
    get_allgather_dtype,
)
from torch.nn import Parameter

ALIGNMENT = 16
"""Bytes: of every dtype's beginning in a row; what vectorized copies on GPUs want."""


def gather_in_one_message(parameter: Parameter) -> None:
    """Let fetches that begin with `parameter` travel in one message; to be called for every parameter of a model."""
    own_way: Callable[..., Any] = parameter.all_gather_coalesced

    def all_gather_coalesced(
        params: Iterable[Parameter], safe_mode: bool = False, quantize: bool = False
    ) -> AllGatherCoalescedHandle | MultipleAllGatherHandles:
        listed = list(params)
        if safe_mode or quantize or not _is_ordinary(listed):
            return own_way(listed, safe_mode=safe_mode, quantize=quantize)
        return _gather(listed)

    parameter.all_gather_coalesced = all_gather_coalesced


def _is_ordinary(params: list[Parameter]) -> bool:
    if len({param.ds_tensor.dtype for param in params}) < 2:
        return False
    group = params[0].ds_process_group
    return params[0].ds_zero_partition_world_size > 1 and all(
        param.ds_process_group is group
        and param.ds_secondary_tensor is None
        and param.nvme_swapper is None
        and get_allgather_dtype(param, param.ds_tensor) == param.ds_tensor.dtype
        for param in params
    )


def _gather(params: list[Parameter]) -> MultipleAllGatherHandles:
    by_dtype: dict[torch.dtype, list[Parameter]] = defaultdict(list)
    # The same order on every rank: the callers hold sets.
    for param in sorted(params, key=lambda param: param.ds_id):
        if param.ds_status != ZeroParamStatus.NOT_AVAILABLE:
            raise RuntimeError(param.ds_summary())
        param.ds_status = ZeroParamStatus.INFLIGHT
        by_dtype[param.ds_tensor.dtype].append(param)
    ranges: dict[torch.dtype, slice] = {}
    row_bytes = 0
    for dtype in sorted(by_dtype, key=lambda dtype: (-dtype.itemsize, str(dtype))):
        num_elements = sum(param.ds_tensor.ds_numel for param in by_dtype[dtype])
        ranges[dtype] = slice(row_bytes, row_bytes + num_elements * dtype.itemsize)
        row_bytes += -(-num_elements * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    first = params[0]
    num_ranks, own_rank = first.ds_zero_partition_world_size, first.ds_zero_partition_rank
    device = get_accelerator().current_device_name()
    rows = torch.empty(num_ranks, row_bytes, dtype=torch.uint8, device=device)
    for dtype, where in ranges.items():
        partitions = [param.ds_tensor.to(device, non_blocking=True) for param in by_dtype[dtype]]
        torch.cat(partitions, out=rows[own_rank, where].view(dtype))
    message = dist.allgather_fn(rows.view(-1), rows[own_rank], group=first.ds_process_group, async_op=True)
    return MultipleAllGatherHandles(
        [
            AllGatherCoalescedHandle(
                allgather_handle=message,
                params=by_dtype[dtype],
                partitions=[row[where].view(dtype) for row in rows],
                world_size=num_ranks,
            )
            for dtype, where in ranges.items()
        ]
    )
