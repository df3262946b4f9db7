"""From the bytes of a checkpoint to this rank's partition of one tensor, without more of it than that.

ZeRO-3 cuts every parameter into R equal partitions, wherever the cuts fall. Of N weights in NF4 rank r owns

    packed              bytes   [r P, (r + 1) P),  P = ceil(ceil(N / 2) / R)      -> blocks floor(r P / 32) ...
    absmax              entries [r A, (r + 1) A),  A = ceil(ceil(N / 64) / R)     -> blocks r A ...
    nested_statistics   entries [r S, (r + 1) S)                                  -> groups of 256 scales, r S ...

The first two name nearly the same blocks of 64 weights (they differ by less than R blocks); the rank reads their union,
quantizes it and keeps what it owns. With double quantization the offset is the mean of all scales of the matrix, so the
scales, 1/32 of the bytes of a bf16 matrix, are gathered; everything else is local.

    in the checkpoint   in the model    what happens
    16 or 32 bits       16 or 32 bits   read own elements, cast
    16 or 32 bits       NF4             read own blocks, cast, quantize
    NF4                 NF4             read own bytes
    NF4                 16 or 32 bits   read own blocks, dequantize

The result is bit for bit that of the whole tensor quantized at once, on any number of ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from sparse_ds.config.errors import UserError
from sparse_ds.distributed.born_partitioned import partition_range
from sparse_ds.distributed.zero3_partitions import gather_partitions, local_partition
from sparse_ds.kernels.nf4 import (
    BLOCK_SIZE,
    NESTED_BLOCK_SIZE,
    dequantize_nf4,
    nf4_sizes,
    quantize_blocks,
    quantize_scales,
    scales_offset,
)
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.stored_nf4 import StoredNF4, find_stored_nf4


@dataclass(frozen=True)
class BaseTensor:
    """One tensor of the base model and how the model keeps it."""

    name: str
    """In the checkpoint."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """In which it is kept, or quantized."""
    nf4: bool = False
    double_quantization: bool = False
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """Where it goes: `weight`; or `packed`, `absmax`, and with double quantization `nested_statistics`. Empty: only a
    plan."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class Range(NamedTuple):
    """Elements [start, stop) of a flat tensor of the checkpoint."""

    name: str
    start: int
    stop: int


class Filling(ABC):
    """Fills the partition of one rank, chunk by chunk.

    Args:
        checkpoint: to read from.
        tensor: what to fill.
        rank, world_size: whose partition.
        device: where to cast and quantize.
    """

    def __init__(
        self, checkpoint: BaseCheckpoint, tensor: BaseTensor, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.checkpoint, self.tensor, self.device = checkpoint, tensor, device
        self.rank, self.world_size = rank, world_size

    @abstractmethod
    def reads(self, chunk_weights: int) -> Iterator[list[Range]]:
        """What is to be read, in pieces of at most `chunk_weights` weights (a multiple of 64 * 256)."""

    @abstractmethod
    def take(self, ranges: list[Range], elements: list[Tensor]) -> None:
        """One piece has been read."""

    def finish(self) -> None:  # noqa: B027  (most have nothing to do)
        """After all pieces. Collectives: perhaps one gather; every rank must call it."""

    def owned(self, num_elements: int) -> tuple[int, int]:
        """[start, stop) of this rank's partition of a parameter of `num_elements`."""
        return partition_range(num_elements, self.rank, self.world_size)

    def local(self, role: str) -> Tensor:
        """This rank's slice of one of the parameters."""
        return local_partition(self.tensor.parameters[role])

    def check_finite(self, elements: Tensor, name: str) -> None:
        """Raises UserError for NaN or Inf."""
        if not bool(torch.isfinite(elements).all()):
            raise UserError(
                f"model.name_or_path: tensor {name!r} of {self.checkpoint.folder} holds NaN or Inf; the checkpoint is "
                "damaged. Get it again."
            )


class DenseFromDense(Filling):
    """Own elements, cast."""

    def reads(self, chunk_weights: int) -> Iterator[list[Range]]:
        start, stop = self.owned(self.tensor.num_elements)
        for begin in range(start, stop, chunk_weights):
            yield [Range(self.tensor.name, begin, min(begin + chunk_weights, stop))]

    def take(self, ranges: list[Range], elements: list[Tensor]) -> None:
        start, _ = self.owned(self.tensor.num_elements)
        cast = elements[0].to(self.device).to(self.tensor.dtype)
        self.check_finite(cast, self.tensor.name)
        self.local("weight")[ranges[0].start - start : ranges[0].stop - start].copy_(cast)


class SameAsDense(DenseFromDense):
    """A second copy of a tied tensor: it must be what the first was, which is filled already."""

    def __init__(self, *args: object, copy_name: str) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.copy_name = copy_name

    def reads(self, chunk_weights: int) -> Iterator[list[Range]]:
        for (piece,) in super().reads(chunk_weights):
            yield [piece._replace(name=self.copy_name)]

    def take(self, ranges: list[Range], elements: list[Tensor]) -> None:
        start, _ = self.owned(self.tensor.num_elements)
        filled = self.local("weight")[ranges[0].start - start : ranges[0].stop - start]
        if not torch.equal(elements[0].to(self.tensor.dtype), filled.cpu()):
            raise UserError(
                f"model.name_or_path: config.json ties {self.copy_name!r} to {self.tensor.name!r}, but "
                f"{self.checkpoint.folder} holds different weights for them. Set `tie_word_embeddings` to false in its "
                "config.json, or get a checkpoint whose files belong together."
            )


class NF4FromDense(Filling):
    """Own blocks, cast and quantized."""

    def __init__(
        self, checkpoint: BaseCheckpoint, tensor: BaseTensor, rank: int, world_size: int, device: torch.device
    ) -> None:
        super().__init__(checkpoint, tensor, rank, world_size, device)
        sizes = nf4_sizes(tensor.num_elements)
        self._packed, self._absmax = self.owned(sizes.packed), self.owned(sizes.absmax)
        self._scales: Tensor | None = None

    def _blocks(self) -> tuple[int, int]:
        bytes_per_block = BLOCK_SIZE // 2
        from_packed = self._packed[0] // bytes_per_block, -(-self._packed[1] // bytes_per_block)
        owned = [blocks for blocks in (from_packed, self._absmax) if blocks[1] > blocks[0]]
        return min((first for first, _ in owned), default=0), max((last for _, last in owned), default=0)

    def reads(self, chunk_weights: int) -> Iterator[list[Range]]:
        first, last = self._blocks()
        stop = min(last * BLOCK_SIZE, self.tensor.num_elements)
        for begin in range(first * BLOCK_SIZE, stop, chunk_weights):
            yield [Range(self.tensor.name, begin, min(begin + chunk_weights, stop))]

    def take(self, ranges: list[Range], elements: list[Tensor]) -> None:
        weights = elements[0].to(self.device).to(self.tensor.dtype)
        self.check_finite(weights, self.tensor.name)
        packed, scales = quantize_blocks(weights)
        _copy_owned(packed, ranges[0].start // 2, self.local("packed"), self._packed[0])
        if not self.tensor.double_quantization:
            kept = self.local("absmax")
        else:
            if self._scales is None:
                self._scales = torch.empty(self._absmax[1] - self._absmax[0], device=self.device)
            kept = self._scales
        _copy_owned(scales, ranges[0].start // BLOCK_SIZE, kept, self._absmax[0])

    def finish(self) -> None:
        """Double quantization. Collectives: one all-gather of the fp32 scales of the matrix."""
        if not self.tensor.double_quantization:
            return
        scales = self._all_scales()
        offset = scales_offset(scales)
        nested_size = nf4_sizes(self.tensor.num_elements).nested_statistics
        nested = self.owned(nested_size)
        num_groups = nested_size - 1
        from_codes = self._absmax[0] // NESTED_BLOCK_SIZE, -(-self._absmax[1] // NESTED_BLOCK_SIZE)
        from_nested = nested[0], min(nested[1], num_groups)
        owned = [groups for groups in (from_codes, from_nested) if groups[1] > groups[0]]
        if owned:
            first, last = min(groups[0] for groups in owned), max(groups[1] for groups in owned)
            codes, group_scales = quantize_scales(scales[first * NESTED_BLOCK_SIZE : last * NESTED_BLOCK_SIZE], offset)
            _copy_owned(codes, first * NESTED_BLOCK_SIZE, self.local("absmax"), self._absmax[0])
            _copy_owned(group_scales, first, self.local("nested_statistics"), nested[0])
        _copy_owned(offset.reshape(1), num_groups, self.local("nested_statistics"), nested[0])
        self._scales = None

    def _all_scales(self) -> Tensor:
        own = torch.empty(0, device=self.device) if self._scales is None else self._scales
        if self.world_size == 1:
            return own
        (scales,) = gather_partitions([self.tensor.parameters["absmax"]], [own], self.device)
        return scales


class _FromNF4(Filling):
    """Args: as `Filling`; `stored`: what the checkpoint says of the matrix."""

    def __init__(
        self,
        checkpoint: BaseCheckpoint,
        tensor: BaseTensor,
        rank: int,
        world_size: int,
        device: torch.device,
        stored: StoredNF4,
    ) -> None:
        super().__init__(checkpoint, tensor, rank, world_size, device)
        self._stored = stored


class NF4FromNF4(_FromNF4):
    """Own bytes."""

    def __init__(
        self,
        checkpoint: BaseCheckpoint,
        tensor: BaseTensor,
        rank: int,
        world_size: int,
        device: torch.device,
        stored: StoredNF4,
    ) -> None:
        super().__init__(checkpoint, tensor, rank, world_size, device, stored)
        sizes = nf4_sizes(tensor.num_elements)
        self._owned = {"packed": self.owned(sizes.packed), "absmax": self.owned(sizes.absmax)}
        self._role_of = {stored.name: "packed", stored.absmax: "absmax"}
        if stored.offset is not None:
            self._owned["nested_statistics"] = self.owned(sizes.nested_statistics)
            self._role_of[stored.nested_absmax] = "nested_statistics"

    def reads(self, chunk_weights: int) -> Iterator[list[Range]]:
        for name, role in self._role_of.items():
            start, stop = self._owned[role]
            if role == "nested_statistics":
                # Its last entry is the offset, which the checkpoint keeps elsewhere.
                stop = min(stop, self.checkpoint.stored(name).num_elements)
            for begin in range(start, stop, chunk_weights // 2):
                end = min(begin + chunk_weights // 2, stop)
                yield [_byte_range(self.checkpoint, name, begin, end) if role == "packed" else Range(name, begin, end)]

    def take(self, ranges: list[Range], elements: list[Tensor]) -> None:
        name, start, _ = ranges[0]
        role = self._role_of[name]
        content = elements[0]
        if role == "packed":
            start, content = start * content.element_size(), content.view(torch.uint8)
        elif content.is_floating_point():
            self.check_finite(content, name)
        _copy_owned(content, start, self.local(role), self._owned[role][0])

    def finish(self) -> None:
        if self._stored.offset is not None:
            where = nf4_sizes(self.tensor.num_elements).nested_statistics - 1
            offset = torch.tensor([self._stored.offset], dtype=torch.float32)
            _copy_owned(offset, where, self.local("nested_statistics"), self._owned["nested_statistics"][0])


class DenseFromNF4(_FromNF4):
    """Own blocks (in whole groups of 256, which have one second-level scale), dequantized."""

    def reads(self, chunk_weights: int) -> Iterator[list[Range]]:
        group = BLOCK_SIZE * NESTED_BLOCK_SIZE
        start, stop = self.owned(self.tensor.num_elements)
        if stop == start:
            return
        aligned_stop = min(-(-stop // group) * group, self.tensor.num_elements)
        for begin in range(start // group * group, aligned_stop, chunk_weights):
            end = min(begin + chunk_weights, aligned_stop)
            sizes = nf4_sizes(end - begin)
            first = begin // BLOCK_SIZE
            ranges = [
                _byte_range(self.checkpoint, self._stored.name, begin // 2, begin // 2 + sizes.packed),
                Range(self._stored.absmax, first, first + sizes.absmax),
            ]
            if self._stored.offset is not None:
                first //= NESTED_BLOCK_SIZE
                ranges.append(Range(self._stored.nested_absmax, first, first + sizes.nested_statistics - 1))
            yield ranges

    def take(self, ranges: list[Range], elements: list[Tensor]) -> None:
        begin = ranges[1].start * BLOCK_SIZE
        num_weights = min((ranges[1].stop - ranges[1].start) * BLOCK_SIZE, self.tensor.num_elements - begin)
        packed, scales, *nested = elements
        nested_statistics = None
        if self._stored.offset is not None:
            nested_statistics = torch.cat([nested[0], torch.tensor([self._stored.offset])]).to(self.device)
        weights = dequantize_nf4(
            packed.view(torch.uint8)[: nf4_sizes(num_weights).packed].to(self.device),
            scales.to(self.device),
            nested_statistics,
            shape=(1, num_weights),
            dtype=self.tensor.dtype,
        ).view(-1)
        self.check_finite(weights, self.tensor.name)
        _copy_owned(weights, begin, self.local("weight"), self.owned(self.tensor.num_elements)[0])


def make_filling(
    checkpoint: BaseCheckpoint, tensor: BaseTensor, rank: int, world_size: int, device: torch.device
) -> Filling:
    """The conversion that this tensor needs.

    Raises:
        UserError: the checkpoint quantizes it otherwise than wanted.
    """
    stored = find_stored_nf4(checkpoint, tensor.name)
    if stored is None:
        kind = NF4FromDense if tensor.nf4 else DenseFromDense
        return kind(checkpoint, tensor, rank, world_size, device)
    if not tensor.nf4:
        return DenseFromNF4(checkpoint, tensor, rank, world_size, device, stored)
    if tensor.double_quantization != (stored.offset is not None):
        having = "with" if stored.offset is not None else "without"
        raise UserError(
            f"model.double_quantization: got {str(tensor.double_quantization).lower()}, but {checkpoint.folder} is "
            f"quantized {having} double quantization; set it to {str(not tensor.double_quantization).lower()}."
        )
    return NF4FromNF4(checkpoint, tensor, rank, world_size, device, stored)


def _byte_range(checkpoint: BaseCheckpoint, name: str, start: int, stop: int) -> Range:
    """Packed bytes [start, stop), in elements of the dtype they are stored as: up to one element more at each end."""
    width = checkpoint.stored(name).dtype.itemsize
    return Range(name, start // width, -(-stop // width))


def _copy_owned(content: Tensor, content_start: int, partition: Tensor, partition_start: int) -> None:
    """Copy what `content` (elements from `content_start` on) and `partition` have in common."""
    start = max(content_start, partition_start)
    stop = min(content_start + content.numel(), partition_start + partition.numel())
    if stop > start:
        partition[start - partition_start : stop - partition_start].copy_(
            content[start - content_start : stop - content_start]
        )
