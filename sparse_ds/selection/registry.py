"""The methods by name, and the event of one matrix as every method has it: drop, then grow as many.

A method says only which weights may grow (`growable`, in its file in `selection/methods`); the rest is the same for
all.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from sparse_ds.selection.apply_event import EventResult, apply_event
from sparse_ds.selection.drop import smallest_magnitude
from sparse_ds.selection.evidence import Evidence, Growable


class Growth(Protocol):
    """`growable` of a method."""

    def __call__(self, evidence: Evidence, staying: Tensor, limit: int) -> Growable:
        """The up to `limit` best weights that are not in `staying` (active ones that are not dropped, ascending)."""
        ...


def find_growth(name: str) -> Growth:
    """`growable` of the method `name`, a file in `selection/methods` whose method has events."""
    growth: Growth = import_module(f"sparse_ds.selection.methods.{name}").growable
    return growth


def select(growth: Growth, evidence: Evidence, num_to_replace: int) -> EventResult:
    """The event of one matrix whose number of active weights stays: drop the worst, grow as many.

    If fewer can be grown than dropped, fewer are dropped: the most for which enough can be grown.

    Memory: O(K + C), for SFT-MA also O(rows + cols). Time: O(K log K).

    Args:
        growth: of the method.
        evidence: of the matrix.
        num_to_replace: k, 0 <= k <= K.

    Raises:
        RuntimeError: a score is not finite.
    """
    if num_to_replace == 0:
        nothing = evidence.indices[:0].long()
        return apply_event(evidence.indices, nothing, nothing)
    # Dropping fewer leaves fewer to choose from, so counting down from k stops at the largest number that fits.
    while True:
        dropped = smallest_magnitude(evidence.drop_scores, evidence.indices, num_to_replace)
        grown = growth(evidence, without(evidence.indices, dropped), num_to_replace).indices
        if grown.numel() == num_to_replace:
            return apply_event(evidence.indices, dropped, grown)
        num_to_replace = grown.numel()


def select_resized(growth: Growth, evidence: Evidence, num_to_drop: int, num_to_grow: int) -> EventResult:
    """The event of one matrix whose number of active weights changes (redistribution between matrices)."""
    dropped = smallest_magnitude(evidence.drop_scores, evidence.indices, num_to_drop)
    grown = growth(evidence, without(evidence.indices, dropped), num_to_grow).indices
    assert grown.numel() == num_to_grow, f"{evidence.name}: {grown.numel()} weights can grow, not {num_to_grow}"
    return apply_event(evidence.indices, dropped, grown)


def without(indices_K: Tensor, positions: Tensor) -> Tensor:
    """[K - k] the entries of `indices_K` that are not at `positions`, in their order."""
    kept = torch.ones(indices_K.numel(), dtype=torch.bool, device=indices_K.device)
    kept[positions] = False
    return indices_K[kept]
