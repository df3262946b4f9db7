"""A uniform random choice among the positions of a tensor that are not taken."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ds.selection.random_subset import random_subset


def random_inactive(
    num_elements: int, occupied_sorted: Tensor, count: int, *, seed: int, name: str, step: int
) -> Tensor:
    """Draw a uniform subset of the free positions, the same on every machine, rank and device.

    The free positions are numbered in ascending order, a subset of the numbers is drawn, and the numbers are mapped
    back to positions. Every (seed, name, step) gives an independent draw, also of the initial subset of the tensor.

    Memory: O(count + occupied). Time: O(occupied + count log(occupied + count)).

    Args:
        num_elements: N, size of the tensor.
        occupied_sorted: [n] int32 or int64 positions that are not to be drawn, unique, ascending.
        count: 0 <= count <= N - n.
        seed: of the run.
        name: of the tensor.
        step: of the event.

    Returns:
        [count] int64 flat positions, unique, ascending, on the device of `occupied_sorted`.
    """
    num_occupied = occupied_sorted.numel()
    num_free = num_elements - num_occupied
    assert 0 <= count <= num_free, f"{name!r}: cannot draw {count} of {num_free} free positions"
    device = occupied_sorted.device
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    ranks = random_subset(num_free, count, seed=seed, name=f"{name}\0random growth\0{step}", device=device)
    # The j-th free position is j + the number of occupied ones before it; `num_free_before` never descends.
    num_free_before = occupied_sorted.long() - torch.arange(num_occupied, device=device)
    return ranks + torch.searchsorted(num_free_before, ranks, right=True)
