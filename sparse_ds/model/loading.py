"""Load a base model into ZeRO-3 partitions: every rank reads about 1 / R of the bytes and holds only what it owns.

    groups     tensors in the order of the files, about 1 GiB together
    chunks     of a group, one after another; the next one is read by a thread while this one is quantized
    agreement  after each group: a rank that meets a damaged file stops all ranks there, not at the end

Memory: the partitions, and two chunks with what quantizing them needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_ds.distributed.process_group import agreement, rank, world_size
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.filling import BaseTensor, Filling, Range, SameAsDense, make_filling

GROUP_BYTES = 2**30
CHUNK_WEIGHTS = {"cpu": 2**18, "cuda": 2**24}
"""Weights of one chunk. On a CPU bitsandbytes makes 16 bytes of intermediate results a weight; a GPU wants more."""


@dataclass(frozen=True)
class LoadReport:
    """What loading took on this rank."""

    num_tensors: int
    bytes_read: int
    wall_s: float


def load_base(
    checkpoint: BaseCheckpoint,
    tensors: Sequence[BaseTensor],
    device: torch.device,
    *,
    tied_copies: Mapping[str, str] | None = None,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> LoadReport:
    """Fill the parameters of `tensors` with this rank's slices.

    Args:
        checkpoint: to read from.
        tensors: what to load, with parameters.
        device: where to quantize.
        tied_copies: name of a further copy in the checkpoint -> name of the tensor, which is loaded once; compared.
        on_bytes: called after each chunk with the bytes read.

    Collectives: an agreement per group and, with double quantization, a gather per matrix; every rank must call it with
    the same tensors.

    Raises:
        UserError: on all ranks, for what any of them found damaged.
    """
    began, before = time.perf_counter(), checkpoint.bytes_read
    place = {name: position for position, name in enumerate(checkpoint.names)}
    in_file_order = sorted(tensors, key=lambda tensor: place[tensor.name])
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        for group in _groups(checkpoint, in_file_order):
            with agreement("loading the base model"):
                fillings = [make_filling(checkpoint, tensor, rank(), world_size(), device) for tensor in group]
                _fill(checkpoint, fillings, reader, on_bytes)
            for filling in fillings:
                filling.finish()
        by_name = {tensor.name: tensor for tensor in tensors}
        with agreement("comparing tied tensors of the base model"):
            copies = [
                SameAsDense(checkpoint, by_name[name], rank(), world_size(), device, copy_name=copy)
                for copy, name in (tied_copies or {}).items()
            ]
            _fill(checkpoint, copies, reader, on_bytes)
    return LoadReport(len(tensors), checkpoint.bytes_read - before, time.perf_counter() - began)


def planned_bytes(checkpoint: BaseCheckpoint, tensors: Iterable[BaseTensor], rank: int, world_size: int) -> int:
    """Bytes that `load_base` reads on one rank; nothing is read but the JSON of quantized matrices."""
    device = torch.device("cpu")
    fillings = (make_filling(checkpoint, tensor, rank, world_size, device) for tensor in tensors)
    return sum(_num_bytes(checkpoint, piece) for filling in fillings for ranges in _reads(filling) for piece in ranges)


def _reads(filling: Filling) -> Iterator[list[Range]]:
    return filling.reads(CHUNK_WEIGHTS[filling.device.type])


def _num_bytes(checkpoint: BaseCheckpoint, piece: Range) -> int:
    return (piece.stop - piece.start) * checkpoint.stored(piece.name).dtype.itemsize


def _groups(checkpoint: BaseCheckpoint, tensors: Sequence[BaseTensor]) -> Iterator[list[BaseTensor]]:
    group: list[BaseTensor] = []
    num_bytes = 0
    for tensor in tensors:
        group.append(tensor)
        num_bytes += checkpoint.stored(tensor.name).num_bytes
        if num_bytes >= GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _fill(
    checkpoint: BaseCheckpoint,
    fillings: Sequence[Filling],
    reader: ThreadPoolExecutor,
    on_bytes: Callable[[int], None],
) -> None:
    """All chunks of all fillings; one is always being read ahead."""

    def read(ranges: list[Range]) -> list[Tensor]:
        return [checkpoint.read_range(*piece) for piece in ranges]

    work = ((filling, ranges) for filling in fillings for ranges in _reads(filling))
    following = next(work, None)
    pending = None if following is None else reader.submit(read, following[1])
    while following is not None and pending is not None:
        (filling, ranges), elements = following, pending.result()
        following = next(work, None)
        pending = None if following is None else reader.submit(read, following[1])
        filling.take(ranges, elements)
        on_bytes(sum(piece.numel() * piece.element_size() for piece in elements))
