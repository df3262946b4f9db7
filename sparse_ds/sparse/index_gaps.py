"""Ascending indices in about one byte each: the gaps between them, as variable-length numbers.

    gap_0 = index_0,  gap_k = index_k - index_(k-1) - 1           0 or more, since indices are unique and ascending
    gap   = its binary digits, 7 a byte, lowest first; the top bit of a byte says that another one follows (LEB128)

At density p a gap is 1 / p on average: one byte for nearly all of them at 2.5 %, two bytes at 0.1 %.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 7
LARGEST_NUM_BYTES = 7
"""Of one gap: 49 bits, more than any matrix has weights."""


def encode_gaps(indices_K: Tensor) -> Tensor:
    """Bytes of the gaps.

    Memory: a few int64 numbers per index, transient.

    Args:
        indices_K: [K] of any integer dtype, 0 or more, strictly ascending.

    Returns:
        [B] uint8, B >= K, on the device of the indices.
    """
    indices_K = indices_K.long()
    gaps_K = torch.diff(indices_K, prepend=indices_K.new_full((1,), -1)) - 1
    num_bytes_K = torch.ones_like(gaps_K)
    for number in range(1, LARGEST_NUM_BYTES):
        num_bytes_K += gaps_K >= 1 << (BITS * number)
    ends_K = num_bytes_K.cumsum(0)
    encoded_B = torch.empty(int(ends_K[-1]) if ends_K.numel() else 0, dtype=torch.uint8, device=indices_K.device)
    for number in range(int(num_bytes_K.max()) if num_bytes_K.numel() else 0):
        has_byte = num_bytes_K > number
        digits = (gaps_K[has_byte] >> (BITS * number)) & (2**BITS - 1)
        goes_on = (num_bytes_K[has_byte] > number + 1).long() << BITS
        encoded_B[(ends_K - num_bytes_K)[has_byte] + number] = (digits | goes_on).to(torch.uint8)
    return encoded_B


def decode_gaps(encoded_B: Tensor) -> Tensor:
    """The indices: the inverse of `encode_gaps`.

    Memory: a few int64 numbers per byte, transient.

    Args:
        encoded_B: [B] uint8.

    Returns:
        [K] int64, strictly ascending unless the bytes are damaged: the caller checks order and range.

    Raises:
        ValueError: no such encoding.
    """
    is_last_B = encoded_B < 1 << BITS
    if encoded_B.numel() and not bool(is_last_B[-1]):
        raise ValueError("the last gap is cut off")
    ends_K = is_last_B.nonzero().view(-1) + 1
    num_bytes_K = torch.diff(ends_K, prepend=ends_K.new_zeros(1))
    if num_bytes_K.numel() and int(num_bytes_K.max()) > LARGEST_NUM_BYTES:
        raise ValueError(f"a gap of {int(num_bytes_K.max())} bytes, expected at most {LARGEST_NUM_BYTES}")
    places_B = torch.arange(encoded_B.numel(), device=encoded_B.device)
    places_B -= torch.repeat_interleave(ends_K - num_bytes_K, num_bytes_K)
    digits_B = (encoded_B.long() & (2**BITS - 1)) << (BITS * places_B)
    gap_of_B = torch.repeat_interleave(torch.arange(ends_K.numel(), device=encoded_B.device), num_bytes_K)
    gaps_K = torch.zeros_like(ends_K).index_add_(0, gap_of_B, digits_B)
    return (gaps_K + 1).cumsum(0) - 1
