"""From a drop and a grow decision to the new indices, and the map that carries per-weight state over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class EventResult:
    """What an event does to one tensor.

    Attributes:
        indices: [n] new indices, dtype of the old ones, unique, ascending; n = K if as many grow as are dropped.
        source: [n] int64, for each new slot the old slot whose weight it holds, or -1 if the weight was grown.
        num_replaced: how many slots were grown, those that kept their weight not counted.
    """

    indices: Tensor
    source: Tensor
    num_replaced: int


def apply_event(indices_K: Tensor, drop_positions: Tensor, grown_indices: Tensor) -> EventResult:
    """Drop some active weights and grow others, usually as many.

    A weight that is both dropped and grown keeps its slot's value and state, and does not count as replaced.

    Memory: O(K). Time: O(K log K).

    Args:
        indices_K: [K] int32 or int64, unique, ascending.
        drop_positions: [k] int64, unique positions in `indices_K`.
        grown_indices: flat indices, unique, none of them active unless it is dropped too.
    """
    num_active = indices_K.numel()
    slots = torch.arange(num_active, device=indices_K.device)
    kept = torch.ones(num_active, dtype=torch.bool, device=indices_K.device)
    kept[drop_positions] = False
    grown_indices = grown_indices.to(indices_K.dtype)
    if num_active:
        places = torch.searchsorted(indices_K, grown_indices).clamp_(max=num_active - 1)
        grown_source = torch.where(indices_K[places] == grown_indices, places, -1)
    else:
        grown_source = torch.full_like(grown_indices, -1, dtype=torch.int64)
    new_indices, order = torch.cat([indices_K[kept], grown_indices]).sort()
    assert bool((new_indices[1:] > new_indices[:-1]).all()), "a weight was grown twice, or while it stayed active"
    source = torch.cat([slots[kept], grown_source])[order]
    return EventResult(new_indices, source, num_replaced=int((grown_source < 0).sum()))


def carry_over(state_K: Tensor, source: Tensor) -> Tensor:
    """Values or state per weight after an event: kept weights keep theirs, grown ones start at 0.

    Args:
        state_K: [K] state by old slot, any dtype; [U, e] where a slot is a block of e weights.
        source: [n] int64, `EventResult.source` or a slice of it (the slots that one rank owns).

    Returns:
        [n] or [n, e], dtype of `state_K`.
    """
    if source.numel() == 0 or state_K.numel() == 0:
        return state_K.new_zeros(source.numel(), *state_K.shape[1:])
    grown = (source < 0).view(-1, *(1 for _ in state_K.shape[1:]))
    return state_K[source.clamp(min=0)].masked_fill_(grown, 0)
