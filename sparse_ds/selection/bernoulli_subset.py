"""Every number of 0 .. N - 1 independently with the same probability, the same on every machine, rank and device.

Element i is chosen if its own uniform 64-bit number is below floor(probability * 2^64). To decide that, 16 bits are
nearly always enough: the first stream of random words gives every element its upper 16 bits, four elements to a word
(the least significant lane first). Only where these equal the upper 16 bits of the threshold, for one element in
65,536, do the other 48 bits matter; the second stream gives them, one word to each such element in ascending order.
What is compared are integers, so nothing is rounded.

The streams are raw words of Philox4x64-10, for the reasons given in `random_subset`.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

_LANES_PER_WORD = 4
_LOW_BITS = 48


def bernoulli_subset(
    num_elements: int,
    probability: float,
    *,
    seed: int,
    name: str,
    device: torch.device | str = "cpu",
    chunk_words: int = 1 << 18,
) -> Tensor:
    """Draw a subset of 0 .. num_elements - 1 that depends on `num_elements`, `probability`, `seed` and `name` only.

    Memory: 16 bytes per chosen element at the peak, and up to 80 bytes per chunk word (20 MiB), on the CPU. Time: O(N);
    of 45 million elements 1 % takes 0.1 seconds on one CPU core.

    Args:
        num_elements: N >= 1, size of the tensor.
        probability: 0 .. 1, taken as the decimal it is written as (0.1 is one tenth), rounded down to 64 binary digits.
        seed: of the run.
        name: of the tensor; other tensors get independent subsets.
        device: of the result.
        chunk_words: words of the first stream drawn at a time, does not change the result.

    Returns:
        [K] int64, ascending, unique. K is random: N * probability on average, variance N * p * (1 - p).
    """
    assert num_elements >= 1 and 0 <= probability <= 1, f"{name!r}: {num_elements} elements, probability {probability}"
    threshold = int(Fraction(str(probability)) * (1 << 64))
    if threshold == 1 << 64:
        return torch.arange(num_elements, device=device)
    upper, lower = threshold >> _LOW_BITS, threshold & ((1 << _LOW_BITS) - 1)
    upper_bits = np.random.Philox(key=_key(seed, name, "upper 16 bits"))
    lower_bits = np.random.Philox(key=_key(seed, name, "lower 48 bits"))
    chosen = []
    for begin in range(0, num_elements, chunk_words * _LANES_PER_WORD):
        num_lanes = min(chunk_words * _LANES_PER_WORD, num_elements - begin)
        words = upper_bits.random_raw(-(-num_lanes // _LANES_PER_WORD))
        lanes = words.astype("<u8", copy=False).view("<u2")[:num_lanes]
        is_chosen = lanes < np.uint16(upper)
        undecided = np.flatnonzero(lanes == np.uint16(upper))
        lows = lower_bits.random_raw(undecided.size) >> np.uint64(64 - _LOW_BITS)
        is_chosen[undecided] = lows < np.uint64(lower)
        chosen.append(np.flatnonzero(is_chosen) + begin)
    return torch.from_numpy(np.concatenate(chosen)).to(device)


def _key(seed: int, name: str, stream: str) -> int:
    digest = hashlib.sha256(f"sparse_ds bernoulli_subset\0{seed}\0{name}\0{stream}".encode()).digest()
    return int.from_bytes(digest[:16], "little")
