"""Ascending integers in about 1.2 bytes each: the low byte of each, and one bit vector for all that is above it.

Of S indices below N, ascending:

    low_bytes    [S] uint8                                     index_k % 256
    high_bits    [ceil((S + ceil(N / 256)) / 8)] uint8         a bit vector, least significant bit first

The high part h_k = index_k // 256 never falls, so h_k + k grows from each to the next: there the k-th one of the bit
vector stands. The sizes depend on S and N only, never on the indices, and the encoding of a list is unique.
Bytes an index: 1 + 1 / 8 + N / (2048 S), that is 1.15 at a density of 2.3 % and 1.61 at 0.1 %.

Slots behind the active indices are encoded too (as the beginning of the last 256 positions); what they decode to means
nothing.

Source: Elias, Efficient storage and retrieval by content and address of static files, J. ACM 21 (1974); Fano, On the
number of bits required to implement an associative memory, MIT Project MAC (1971). Differs from them: the low part is
always one byte, whatever the density, so that it lies like `values` and is cut at the same places.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW_BITS = 8


def num_high_bytes(num_slots: int, num_positions: int) -> int:
    """Bytes of `high_bits` for S = `num_slots` indices below N = `num_positions`."""
    return -(-(num_slots + -(-num_positions >> LOW_BITS)) // 8)


def encode_indices(indices_S: Tensor, num_active: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """See the module docstring.

    Memory: 17 bytes an index and one per bit of the bit vector, transient.

    Args:
        indices_S: [S] integers, of which the first `num_active` are ascending and below `num_positions`.
        num_active: K.
        num_positions: N, 1 or more.

    Returns:
        (low_bytes [S], high_bits [`num_high_bytes`]), both uint8.
    """
    indices = indices_S.to(torch.int64, copy=True)
    indices[num_active:] = (num_positions - 1) >> LOW_BITS << LOW_BITS
    places = (indices >> LOW_BITS).add_(torch.arange(indices.numel(), device=indices.device))
    bits = torch.zeros(num_high_bytes(indices.numel(), num_positions) * 8, dtype=torch.uint8, device=indices.device)
    bits[places] = 1
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    high_bits = bits.view(-1, 8).mul_(weights).sum(1, dtype=torch.uint8)
    return (indices & 255).to(torch.uint8), high_bits


def decode_indices(
    low_bytes_n: Tensor, high_bits: Tensor, num_slots: int, dtype: torch.dtype, *, start: int = 0
) -> Tensor:
    """[n] of `dtype`: the indices `start` to `start + n - 1` of the S = `num_slots`. No device synchronization.

    Memory: 8 bytes an index of all, 8 a decoded one and one per bit of the bit vector, transient.

    Args:
        low_bytes_n: [n] uint8, of the wanted indices.
        high_bits: the whole bit vector.
        num_slots: S, the ones in it.
        dtype: that holds the indices.
        start: the number of the first wanted one.
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=high_bits.device)
    bits = (high_bits[:, None] >> shifts).bitwise_and_(1).view(-1)
    num_wanted = low_bytes_n.numel()
    places = torch.nonzero_static(bits, size=num_slots).view(-1)[start : start + num_wanted]
    high = places.sub_(torch.arange(start, start + num_wanted, device=places.device))
    return high.bitwise_left_shift_(LOW_BITS).bitwise_or_(low_bytes_n).to(dtype)
