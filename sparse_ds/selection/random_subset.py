"""A uniform random subset of 0 .. N - 1 with exactly K elements, the same on every machine, rank and device.

Draw K numbers with replacement, keep the distinct ones, draw as many again as are missing, and so on until K are there.
Why this is uniform: the draws are independent and uniform, and how many are drawn depends only on how many distinct
numbers were seen, not on which. So renaming the numbers 0 .. N - 1 in any way changes no probability, and all K-subsets
are equally likely. A round never draws more than are missing, so nothing has to be thrown away.

With K <= N / 2 at most half of a round's draws are in vain on average, so about 1.4 K draws in all suffice. A larger K
draws the N - K numbers that are left out.

The random bits are Philox4x64-10 (Salmon et al. 2011), whose stream NumPy guarantees across versions and platforms, and
its raw 64-bit words are mapped to 0 .. N - 1 here, with rejection: without bias for every N. Methods that turn words
into bounded integers have changed between versions of NumPy and of torch, so none is used.
"""

from __future__ import annotations

import hashlib
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Int64Array: TypeAlias = NDArray[np.int64]


def random_subset(
    num_elements: int, num_active: int, *, seed: int, name: str, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw a uniform K-subset of 0 .. num_elements - 1 that depends on the sizes, `seed` and `name` only.

    Memory: O(K), about 40 bytes per element at the peak, on the CPU. Time: O(K log K).

    Args:
        num_elements: N >= 1, size of the tensor.
        num_active: K, 0 <= K <= N.
        seed: of the run.
        name: of the tensor; other tensors get independent subsets.
        device: of the result.

    Returns:
        [K] int64, ascending, unique.
    """
    assert 0 <= num_active <= num_elements and num_elements >= 1, f"{name!r}: {num_active} of {num_elements} elements"
    key = hashlib.sha256(f"sparse_ds random_subset\0{seed}\0{name}".encode()).digest()[:16]
    bits = np.random.Philox(key=int.from_bytes(key, "little"))
    num_drawn = min(num_active, num_elements - num_active)
    subset = _draw_distinct(bits, num_elements, num_drawn)
    if num_drawn < num_active:
        subset = _complement(subset, num_active)
    return torch.from_numpy(subset).to(device)


def _draw_distinct(bits: np.random.Philox, num_elements: int, num_drawn: int) -> Int64Array:
    """[num_drawn] ascending distinct numbers below num_elements."""
    drawn = _sort_distinct(_draw(bits, num_elements, num_drawn))
    # Later rounds are short: collect them apart, and merge them into the long first round once.
    added = np.empty(0, dtype=np.int64)
    while (num_missing := num_drawn - drawn.size - added.size) > 0:
        fresh = _sort_distinct(_draw(bits, num_elements, num_missing))
        added = _merge(added, fresh[~_contains(drawn, fresh) & ~_contains(added, fresh)])
    return _merge(drawn, added)


def _draw(bits: np.random.Philox, num_elements: int, count: int) -> Int64Array:
    """[<= count] independent uniform numbers below num_elements.

    Words of the incomplete last interval of length num_elements below 2^64 are rejected (a share of at most
    num_elements / 2^64), so a result may be short: the next round draws again.
    """
    words = bits.random_raw(count)
    limit = (1 << 64) // num_elements * num_elements
    if limit < 1 << 64:
        words = words[words < np.uint64(limit)]
    return (words % np.uint64(num_elements)).astype(np.int64)


def _sort_distinct(numbers: Int64Array) -> Int64Array:
    """Ascending, each number once (`np.unique` goes through a hash table here, ten times slower)."""
    ascending = np.sort(numbers)
    return ascending[np.diff(ascending, prepend=-1) > 0]


def _merge(ascending: Int64Array, others: Int64Array) -> Int64Array:
    """Two disjoint ascending arrays as one."""
    return np.insert(ascending, np.searchsorted(ascending, others), others)


def _contains(ascending: Int64Array, queries: Int64Array) -> NDArray[np.bool_]:
    """Which of the queries are in an ascending array."""
    return np.searchsorted(ascending, queries, side="right") > np.searchsorted(ascending, queries)


def _complement(left_out: Int64Array, num_active: int) -> Int64Array:
    """The [num_active] numbers that are not in `left_out`, ascending: the j-th is j + (left-out numbers before it)."""
    ranks = np.arange(num_active, dtype=np.int64)
    return ranks + np.searchsorted(left_out - np.arange(left_out.size), ranks, side="right")
