"""Dense gradients reduced over ranks tile by tile, and lists that every rank owns a slice of.

A tile is a run of consecutive flat positions of one matrix. Its sum over ranks is cut into R equal parts, and every
rank keeps one:

    tile    [ part of rank 0 | part of rank 1 | ... ]     ceil(n / R) positions each, the last ones shorter or empty

Where `unit` is given, that many elements (of one block of weights) stay together: n counts units then.

These collectives run inside backward, in the order of the graph, which is the same on all ranks; they go through the
process group that DeepSpeed uses and are issued from the same thread, one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.nn import Parameter

from sparse_ds.distributed.process_group import rank, world_size
from sparse_ds.distributed.zero3_partitions import owned_range


def part_of_tile(num_elements: int) -> tuple[int, int]:
    """(begin, end) of this rank's part of a tile."""
    size = -(-num_elements // world_size())
    return min(rank() * size, num_elements), min((rank() + 1) * size, num_elements)


def reduce_tile(tile_n: Tensor, unit: int = 1) -> Tensor:
    """This rank's part of the mean over ranks (the sum divided by R, as DeepSpeed averages gradients).

    Args:
        tile_n: [n * unit] any floating dtype, contiguous; may be overwritten.
        unit: elements that stay together.

    Returns:
        fp32, the positions of `part_of_tile(n)`.

    Memory: a copy in fp32 where the tile is not, or n is no multiple of R; the part.
    Collectives: one reduce-scatter of 4 n bytes; every rank must call it.
    """
    num_ranks, num_elements = world_size(), tile_n.numel()
    if num_ranks == 1:
        return tile_n.float()
    size = -(-num_elements // (num_ranks * unit)) * unit
    if tile_n.dtype != torch.float32 or num_elements != size * num_ranks:
        padded = torch.zeros(size * num_ranks, dtype=torch.float32, device=tile_n.device)
        padded[:num_elements] = tile_n
        tile_n = padded
    part = torch.empty(size, dtype=torch.float32, device=tile_n.device)
    torch.distributed.reduce_scatter_tensor(part, tile_n)
    begin, end = part_of_tile(num_elements // unit)
    return part[: (end - begin) * unit].div_(num_ranks)


def sum_over_ranks(counts: Tensor) -> Tensor:
    """The sum of an integer tensor over ranks, in place.

    Collectives: one all-reduce; every rank must call it.
    """
    if world_size() > 1:
        torch.distributed.all_reduce(counts)
    return counts


def counts_of_ranks(counts_P: Tensor) -> Tensor:
    """[R, P] the int64 counts of all ranks.

    Collectives: one all-gather of 8 P bytes; every rank must call it.
    """
    counts_RP = torch.empty(world_size(), counts_P.numel(), dtype=torch.int64, device=counts_P.device)
    torch.distributed.all_gather_into_tensor(counts_RP.view(-1), counts_P.contiguous())
    return counts_RP


def place_slices(parameter: Parameter, places: Tensor, entries: list[Tensor], unit: int = 1) -> list[Tensor]:
    """Spread lists, of which every rank has some entries, over the ranks like the slices of `parameter`.

    Args:
        parameter: partitioned, [S * unit]; every rank owns whole units.
        places: [n] int64 position in the whole list of each of this rank's entries; no position belongs to two ranks.
        entries: lists [n] or [n, m]; the ranks' entries together make at most [S] each, zeros behind.

    Returns:
        This rank's slice of each list (real elements only).

    Memory: S elements of each list, one at a time.
    Collectives: one reduce-scatter per list; every rank must call it.
    """
    size = parameter.ds_tensor.ds_numel // unit
    slices = []
    for entry in entries:
        whole = torch.zeros(size * world_size(), *entry.shape[1:], dtype=entry.dtype, device=entry.device)
        whole[places] = entry
        slices.append(_reduce_scatter(whole, size)[: owned_range(parameter)[1] // unit])
    return slices


def gather_slices(parameter: Parameter, slice_n: Tensor, unit: int = 1) -> Tensor:
    """[S] the whole list from every rank's slice, as `parameter` [S * unit] is partitioned.

    Collectives: one all-gather; every rank must call it.
    """
    size = parameter.ds_tensor.ds_numel // unit
    padded = torch.zeros(size, dtype=slice_n.dtype, device=slice_n.device)
    padded[: slice_n.numel()] = slice_n
    whole = torch.empty(size * world_size(), dtype=slice_n.dtype, device=slice_n.device)
    torch.distributed.all_gather_into_tensor(whole, padded)
    return whole[: parameter.ds_numel // unit]


def reduce_to_slices(parameter: Parameter, gradient_S: Tensor) -> Tensor:
    """This rank's slice of the mean over ranks of [S] fp32 numbers, as `parameter` is partitioned (zeros if it is
    longer).

    Collectives: one reduce-scatter; every rank must call it.
    """
    size = parameter.ds_tensor.ds_numel
    padded = gradient_S
    if gradient_S.numel() != size * world_size():
        padded = torch.zeros(size * world_size(), dtype=gradient_S.dtype, device=gradient_S.device)
        padded[: gradient_S.numel()] = gradient_S
    return _reduce_scatter(padded, size)[: owned_range(parameter)[1]].div_(world_size())


def clip_coefficient(engine: Any) -> float | None:
    """By what the engine has just multiplied the averaged gradients to clip them (1: not at all); None if it skipped
    the step. To be asked after `engine.step()`. Collectives: none."""
    if not engine.was_step_applied():
        return None
    zero = engine.optimizer
    if zero.clip_grad <= 0:
        return 1.0
    return 1.0 / max(1.0, (float(zero._global_grad_norm) + 1e-6) / float(zero.clip_grad))


def _reduce_scatter(whole: Tensor, size: int) -> Tensor:
    if world_size() == 1:
        return whole
    part = torch.empty(size, *whole.shape[1:], dtype=whole.dtype, device=whole.device)
    torch.distributed.reduce_scatter_tensor(part, whole)
    return part
