"""One sha256 for all indices of a model: what two runs, two ranks or an event and its adapter are compared by.

    hash = sha256( digest of each tensor, in the order of the sorted names )
    digest(tensor) = sha256( name, K, the K ascending indices as little-endian int64 )

Hashing tensor by tensor first means that the indices may come one tensor at a time and in any order: memory is that
of one tensor, never of all of them. The stored integer type (int32 or int64) does not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


class IndexHash:
    """The hash, built up tensor by tensor in any order."""

    def __init__(self) -> None:
        self._digests: dict[str, bytes] = {}

    def add(self, name: str, indices_K: Tensor) -> None:
        """Take in one tensor's indices: [K], any integer dtype, any device, strictly ascending; each name once."""
        assert name not in self._digests, f"{name} came twice"
        self._digests[name] = _tensor_digest(name, indices_K)

    def hexdigest(self) -> str:
        """64 hexadecimal digits."""
        combined = hashlib.sha256()
        for name in sorted(self._digests):
            combined.update(self._digests[name])
        return combined.hexdigest()


def hash_indices(indices_by_name: Iterable[tuple[str, Tensor]]) -> str:
    """The sha256 of the global indices of all tensors, given as (name, indices); a generator is read one at a time."""
    combined = IndexHash()
    for name, indices_K in indices_by_name:
        combined.add(name, indices_K)
    return combined.hexdigest()


def _tensor_digest(name: str, indices_K: Tensor) -> bytes:
    assert indices_K.dim() == 1, f"{name}: indices have shape {tuple(indices_K.shape)}"
    assert bool((indices_K[1:] > indices_K[:-1]).all()), f"{name}: indices are not strictly ascending"
    digest = hashlib.sha256(f"{name}\0{indices_K.numel()}\0".encode())
    little_endian_K = indices_K.detach().to("cpu", torch.int64).contiguous().numpy().astype("<i8", copy=False)
    digest.update(little_endian_K.data)
    return digest.digest()
