"""Put the deltas into a dense weight buffer for the time of one product, and take them out again, bit for bit.

The merged weight is `round(fp32 w + fp32 value)` to the dtype of the buffer: the same rule in the forward pass, in the
backward pass and in the exported checkpoint, so that all of them see one and the same model. In bf16 a delta below
half a unit in the last place of its weight leaves the weight unchanged ("hidden").

Where active weights come in strips of `n` neighbours (rows of blocks), the positions are those of the strips in the
buffer read as [N / n, n], and every [K] below is [number of strips, n].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from sparse_ds.kernels import triton_kernels


def merged_values(weights_K: Tensor, values_K: Tensor) -> Tensor:
    """`round(fp32 w + fp32 value)` in the dtype of `weights_K`.

    Args:
        weights_K: [K] base weights at the indices, any floating dtype.
        values_K: [K] fp32 deltas, same shape.
    """
    return (weights_K.float() + values_K).to(weights_K.dtype)


@contextmanager
def deltas_applied(weight_OI: Tensor, indices_K: Tensor, values_K: Tensor) -> Iterator[Tensor]:
    """Within the context `weight_OI` holds the merged weight; on exit every byte of it is as before, also on errors.

    Memory: K saved weights; on the CPU for a moment K merged ones and 8 bytes a position more. No dense copy.

    Args:
        weight_OI: [O, I] contiguous, edited in place (it may be ZeRO-3's gathered buffer, or with one rank the
            partition itself).
        indices_K: [K] flat row-major positions, int32 or int64, unique; of strips where the values are [.., n].
        values_K: [K] fp32.
    """
    if triton_kernels.available(weight_OI):
        saved_K = triton_kernels.put_deltas_(weight_OI, indices_K, values_K)
        try:
            yield weight_OI
        finally:
            triton_kernels.put_back_(weight_OI, indices_K, saved_K)
        return
    # `index_copy_` takes int64 only; it is the fastest write there is (bf16 `scatter_` takes ten times as long; what
    # torch.compile makes of these lines, up to three times). The int64 positions are not kept meanwhile.
    flat_N = weight_OI.view(-1, *values_K.shape[1:])
    positions_K = indices_K.long()
    saved_K = flat_N.index_select(0, positions_K)
    flat_N.index_copy_(0, positions_K, merged_values(saved_K, values_K))
    del positions_K
    try:
        yield weight_OI
    finally:
        flat_N.index_copy_(0, indices_K.long(), saved_K)


def apply_deltas_(weight_OI: Tensor, indices_K: Tensor, values_K: Tensor) -> Tensor:
    """Put the deltas into a buffer that nobody else needs (a freshly dequantized one); returns `weight_OI`."""
    if triton_kernels.available(weight_OI):
        triton_kernels.put_deltas_(weight_OI, indices_K, values_K)
        return weight_OI
    flat_N, positions_K = weight_OI.view(-1, *values_K.shape[1:]), indices_K.long()
    flat_N.index_copy_(0, positions_K, merged_values(flat_N.index_select(0, positions_K), values_K))
    return weight_OI


def hidden_counts(weights_K: Tensor, values_K: Tensor) -> tuple[int, int]:
    """(hidden, non-zero): how many of the non-zero deltas the rounding of the merged weight hides, and of how many."""
    nonzero = values_K != 0
    hidden = (merged_values(weights_K, values_K) == weights_K) & nonzero
    return int(hidden.sum()), int(nonzero.sum())
