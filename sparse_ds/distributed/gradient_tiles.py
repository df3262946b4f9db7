"""Dense gradients reduced over ranks tile by tile, and lists that every rank owns a slice of.

A tile is a run of consecutive flat positions of one matrix. Its sum over ranks is cut into R equal parts, and every
rank keeps one:

    tile    [ part of rank 0 | part of rank 1 | ... ]     ceil(n / R) positions each, the last ones shorter or empty

Where `unit` is given, that many elements (of one block of weights) stay together: n counts units then.

These collectives run inside backward, in the order of the graph, which is the same on all ranks; they go through the
process group that DeepSpeed uses and are issued from the same thread, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def place_slices(
    parameters: Sequence[Parameter], places: Sequence[Tensor], entries: Sequence[Sequence[Tensor]], units: Sequence[int]
) -> list[list[Tensor]]:
    """Spread lists, of which every rank has some entries, over the ranks like the slices of parameters.

    Args:
        parameters: partitioned, [S * unit] each; every rank owns whole units.
        places: for each parameter [n] int64, the position in the whole list of each of this rank's entries; no position
            belongs to two ranks.
        entries: for each parameter some lists [n] or [n, m] of 4 or 8 bytes a number; the ranks' entries together make
            at most [S] each, zeros behind.
        units: of the parameters.

    Returns:
        For each parameter this rank's slice of each of its lists (real elements only).

    Memory: all lists whole, twice.
    Collectives: one reduce-scatter of all lists; every rank must call it.
    """
    whole_lists, owners = [], []
    for parameter, own_places, own_entries, unit in zip(parameters, places, entries, units, strict=True):
        num_places = parameter.ds_tensor.ds_numel // unit * world_size()
        for entry in own_entries:
            whole = torch.zeros(num_places, *entry.shape[1:], dtype=entry.dtype, device=entry.device)
            whole[own_places] = entry
            # All ranks but one have 0 at a place, so the sum of integers moves bits of any kind.
            whole_lists.append(whole.view(world_size(), -1).view(torch.int32))
            owners.append((entry, owned_range(parameter)[1] // unit))
    parts = _reduce_scatter(whole_lists)
    slices = [
        part.clone().view(entry.dtype).view(-1, *entry.shape[1:])[:num_own]
        for (entry, num_own), part in zip(owners, parts, strict=True)
    ]
    rest = iter(slices)
    return [[next(rest) for _ in own_entries] for own_entries in entries]


def reduce_to_slices(parameters: Sequence[Parameter], gradients: Sequence[Tensor]) -> list[Tensor]:
    """This rank's slices of the mean over ranks of lists [S] of fp32 numbers, each sliced like its parameter (zeros if
    that is longer).

    Memory: all lists once more, padded.
    Collectives: one reduce-scatter of all lists; every rank must call it with the same parameters.
    """
    whole_lists = []
    for parameter, gradient_S in zip(parameters, gradients, strict=True):
        size = parameter.ds_tensor.ds_numel
        padded = gradient_S
        if gradient_S.numel() != size * world_size():
            padded = gradient_S.new_zeros(size * world_size())
            padded[: gradient_S.numel()] = gradient_S
        whole_lists.append(padded.view(world_size(), size))
    parts = _reduce_scatter(whole_lists)
    return [
        part[: owned_range(parameter)[1]].div_(world_size()) for parameter, part in zip(parameters, parts, strict=True)
    ]


def clip_coefficient(engine: Any) -> float | None:
    """By what the engine has just multiplied the averaged gradients to clip them (1: not at all); None if it skipped
    the step. To be asked after `engine.step()`. Collectives: none."""
    if not engine.was_step_applied():
        return None
    zero = engine.optimizer
    if zero.clip_grad <= 0:
        return 1.0
    return 1.0 / max(1.0, (float(zero._global_grad_norm) + 1e-6) / float(zero.clip_grad))


def _reduce_scatter(whole_lists: Sequence[Tensor]) -> list[Tensor]:
    """This rank's row of each [R, n] list, summed over ranks; all of one dtype."""
    if world_size() == 1:
        return [whole[0] for whole in whole_lists]
    joined = torch.cat(list(whole_lists), dim=1)
    part = torch.empty(joined.shape[1], dtype=joined.dtype, device=joined.device)
    torch.distributed.reduce_scatter_tensor(part, joined.view(-1))
    return list(torch.split(part, [whole.shape[1] for whole in whole_lists]))
