"""A view on the state of a ZeRO-3 engine: which slice of which tensor this rank owns, and where it lies.

DeepSpeed joins the partitions of all trainable parameters of a sub-group into one flat fp32 tensor, the master:

    flat = z.fp32_partitioned_groups_flat[i]      one per sub-group i; what the inner optimizer steps on
    [ p0 real | pad | p1 real | pad | ... ]       p in z.fp16_groups[i], each with ceil(numel / R) elements

The master exists beside `param.ds_tensor` (the copy that is gathered). Writing one does not write the other, and a
parameter that is still gathered (`ds_status` AVAILABLE) keeps its old content until it is released.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class OwnedSlice:
    """What this rank owns of one trainable parameter: flat elements [start, start + num_real) of the tensor, which lie
    at [offset, offset + num_real) of the master of sub-group `sub_group`."""

    sub_group: int
    offset: int
    start: int
    num_real: int


def owned_range(parameter: Parameter) -> tuple[int, int]:
    """(start, num_real) of this rank's slice of any ZeRO-3 parameter, trainable or frozen; of a parameter that is not
    partitioned: all of it."""
    if not hasattr(parameter, "ds_tensor"):
        return 0, parameter.numel()
    size = parameter.ds_tensor.ds_numel
    start = min(parameter.ds_zero_partition_rank * size, parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)


def full_size(parameter: Parameter) -> int:
    """Elements of the whole tensor, wherever they are (`parameter.numel()` is 0 while it is not gathered)."""
    return int(parameter.ds_numel)


def full_shape(parameter: Parameter) -> tuple[int, ...]:
    """Shape of the whole tensor."""
    return tuple(parameter.ds_shape)


def local_partition(parameter: Parameter) -> Tensor:
    """The real elements (no padding) of this rank's slice of `parameter`; a view: writing changes what is gathered."""
    partition: Tensor = getattr(parameter, "ds_tensor", parameter.data)
    return partition.view(-1).narrow(0, 0, owned_range(parameter)[1])


def is_whole(parameter: Parameter, device: torch.device) -> bool:
    """Whether this rank's slice of a parameter is all of it and lies on `device` (one rank, nothing offloaded): then
    what is gathered is that slice itself, not a copy."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.device.type == device.type
    return bool(parameter.ds_zero_partition_world_size == 1 and parameter.ds_tensor.device.type == device.type)


class MasterWeights:
    """The flat fp32 master weights of a ZeRO-3 engine, by parameter.

    Args:
        engine: a DeepSpeed engine after `initialize`.
    """

    def __init__(self, engine: Any) -> None:
        self._zero = engine.optimizer
        self.slices: dict[int, OwnedSlice] = {}
        for sub_group, parameters in enumerate(self._zero.fp16_groups):
            for parameter in parameters:
                index, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start, num_real = owned_range(parameter)
                if index != sub_group:
                    raise RuntimeError(f"DeepSpeed's grad_position names sub-group {index}, expected {sub_group}")
                self.slices[id(parameter)] = OwnedSlice(sub_group, offset, start, num_real)

    @property
    def flats(self) -> list[Tensor]:
        """One flat fp32 tensor per sub-group, padding included, in DeepSpeed's order."""
        return list(self._zero.fp32_partitioned_groups_flat)

    def parameters_of(self, sub_group: int) -> list[Parameter]:
        """Parameters joined in the flat tensor of `sub_group`, in their order there."""
        return list(self._zero.fp16_groups[sub_group])

    def slice_of(self, parameter: Parameter) -> OwnedSlice:
        """Which elements of `parameter` this rank owns and where they lie."""
        return self.slices[id(parameter)]

    def view(self, parameter: Parameter, flat_like: Sequence[Tensor] | None = None) -> Tensor:
        """Real elements of `parameter` in the master, or in other flat tensors of the same shapes (optimizer state)."""
        where = self.slice_of(parameter)
        flat = (self.flats if flat_like is None else flat_like)[where.sub_group]
        return flat.detach().narrow(0, where.offset, where.num_real)

    def write_values(self, parameter: Parameter, values: Tensor) -> None:
        """Write this rank's slice of a trainable parameter: the master and the copy that is gathered.

        A parameter that is gathered at the moment keeps its old content: call `release_gathered` after
        the last write.
        """
        self.view(parameter).copy_(values)
        local_partition(parameter).copy_(values)

    def padding_of(self, sub_group: int) -> list[tuple[int, int]]:
        """[begin, end) ranges of the flat tensor of `sub_group` that belong to no parameter, ascending."""
        ranges, end = [], 0
        slices = [self.slice_of(parameter) for parameter in self.parameters_of(sub_group)]
        for where in sorted(slices, key=lambda where: where.offset):
            if where.offset > end:
                ranges.append((end, where.offset))
            end = where.offset + where.num_real
        num_elements = self.flats[sub_group].numel()
        return [*ranges, (end, num_elements)] if end < num_elements else ranges

    def zero_padding(self) -> None:
        """Set the elements of the masters that belong to no parameter to zero (they start uninitialised)."""
        for sub_group, flat in enumerate(self.flats):
            for begin, end in self.padding_of(sub_group):
                flat.detach()[begin:end] = 0.0


def release_gathered(engine: Any) -> None:
    """Give back all gathered parameters: the next use gathers what their partitions hold now.

    `engine.empty_partition_cache` does the same, and then collects Python's garbage and returns the device's free
    memory to the driver, which the next step needs again. Collectives: none.
    """
    engine.optimizer.empty_partition_cache()


GATHER_BYTES = 2**28
"""Gathered bytes of one batch of tensors (256 MiB): few collectives, and a bound on what they need at one time."""

T = TypeVar("T")


def batches_to_gather(items: Iterable[T], num_bytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Cut `items` into runs of at most GATHER_BYTES in all; a single larger item is a batch of its own."""
    batch: list[T] = []
    batch_bytes = 0
    for item in items:
        item_bytes = num_bytes(item)
        if batch and batch_bytes + item_bytes > GATHER_BYTES:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(item)
        batch_bytes += item_bytes
    if batch:
        yield batch


def gather_partitions(
    parameters: Sequence[Parameter],
    partitions: Sequence[Tensor],
    device: torch.device,
    units: Sequence[int] | None = None,
) -> list[Tensor]:
    """Full flat tensors from every rank's slices, for several tensors in one collective.

    Args:
        parameters: whose slicing applies.
        partitions: this rank's real elements of each, any dtypes and devices (`local_partition`, `MasterWeights.view`).
        device: where to gather (the device of the process group).
        units: of each, how many elements of the parameter one element of the partition stands for (a block of weights;
            every rank owns whole ones); by default 1.

    Returns:
        One tensor [ds_numel / unit] per parameter on `device`.

    Memory: the full tensors, and with several ranks once more their bytes, transient.
    Collectives: with several ranks one all-gather of the slices' bytes; every rank must call it with the same
    parameters.
    """
    units = units or [1] * len(parameters)
    sizes = [
        parameter.ds_tensor.ds_numel // unit * partition.element_size()
        for parameter, partition, unit in zip(parameters, partitions, units, strict=True)
    ]
    # Wide dtypes first, so that every slice of the byte buffer is aligned.
    order = sorted(range(len(parameters)), key=lambda i: -partitions[i].element_size())
    local = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    begins, end = [0] * len(parameters), 0
    for i in order:
        begins[i], end = end, end + sizes[i]
        own = local[begins[i] : end].view(partitions[i].dtype)
        own[: partitions[i].numel()] = partitions[i]
    everywhere, num_ranks = local, torch.distributed.get_world_size()
    if num_ranks > 1:
        everywhere = torch.empty(num_ranks * local.numel(), dtype=torch.uint8, device=device)
        torch.distributed.all_gather_into_tensor(everywhere, local)
    del local
    rows = everywhere.view(num_ranks, -1)
    return [
        rows[:, begin : begin + size].reshape(-1).view(partition.dtype)[: parameter.ds_numel // unit]
        for parameter, partition, unit, begin, size in zip(parameters, partitions, units, begins, sizes, strict=True)
    ]


def all_reduce_max_(tensor: Tensor, device: torch.device) -> None:
    """Element-wise maximum over all ranks, in place (through `device` when the tensor lies elsewhere).

    Collectives: one all-reduce of the tensor; every rank must call it.
    """
    moved = tensor.to(device)
    torch.distributed.all_reduce(moved, op=torch.distributed.ReduceOp.MAX)
    if moved is not tensor:
        tensor.copy_(moved)


def all_reduce_sum(numbers: Iterable[float], device: torch.device) -> list[float]:
    """Sums over all ranks, in fp64.

    Collectives: one all-reduce; every rank must call it with as many numbers.
    """
    tensor = torch.tensor(list(numbers), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return [float(x) for x in tensor.tolist()]


def require_equal(digest: str, what: str) -> None:
    """Stop the run on all ranks if `digest` differs between ranks.

    Collectives: one gather of a short text; every rank must call it.

    Raises:
        RuntimeError: names the ranks that differ from rank 0.
    """
    digests: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, digest)
    different = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if different:
        raise RuntimeError(
            f"{what} differs between ranks: rank 0 has {digests[0]}, ranks {different} have other values. This is a "
            "defect or a hardware fault; the run stops because its results would be wrong."
        )
