"""How the indices of a sparse layer are stored, and read and written outside of its products.

    "int32"       `indices` (int64 in a matrix of 2^31 weights or more): 4 bytes an active weight
    "compact"     `index_low_bytes` and `index_high_bits` (`sparse.compact_indices`): about 1.2

    new_index_tensors(...)        what a layer's parameters begin with
    index_parameters(layer)       its parameters that hold indices
    layer.active_indices          [K] of the gathered layer: in forward and backward
    stored_pieces(layer)          this rank's part as it is stored, to be gathered with other things,
    indices_of_pieces(layer, ..)    and what that gives
    own_indices(layer)            this rank's slice, as `values` is partitioned; gathered or not
    write_indices(layer, all)     each rank gives the whole list and keeps its slice: events

A rank cannot tell its indices from its own part of a bit vector: where they are compact, `own_indices` communicates.
Nobody else looks at the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor
from torch.nn import Parameter

from sparse_ds.distributed.zero3_partitions import gather_partitions, local_partition, owned_range
from sparse_ds.sparse.compact_indices import decode_indices, encode_indices
from sparse_ds.sparse.layout import SparseLayout
from sparse_ds.sparse.sparse_linear import INDEX_TENSORS, SparseLayer

IndexStorage = Literal["int32", "compact"]


class Piece(NamedTuple):
    """This rank's part of one tensor, for `gather_partitions`."""

    parameter: Parameter
    """Whose slicing applies."""
    partition: Tensor
    """Real elements."""
    unit: int = 1
    """Elements of the parameter that one of the partition stands for."""


def new_index_tensors(
    indices_S: Tensor, layout: SparseLayout, num_active: int, storage: IndexStorage
) -> dict[str, Tensor]:
    """Whole tensors by the names of the layer's parameters.

    Args:
        indices_S: [`num_index_slots`] integers; the active ones unique and ascending.
        layout: of the layer.
        num_active: of the indices.
        storage: compact with blocks of one weight only.
    """
    if storage == "int32":
        return {"indices": indices_S.to(layout.index_dtype)}
    assert layout.block_elements == 1, f"compact indices of blocks: {layout}"
    low_bytes_S, high_bits = encode_indices(indices_S, num_active, layout.num_positions)
    return {"index_low_bytes": low_bytes_S, "index_high_bits": high_bits}


def index_parameters(layer: SparseLayer) -> dict[str, Parameter]:
    """By name: `indices`, or the two of the compact form."""
    found = {name: getattr(layer, name, None) for name in INDEX_TENSORS}
    return {name: parameter for name, parameter in found.items() if parameter is not None}


def are_compact(layer: SparseLayer) -> bool:
    """Whether the layer's indices are stored in the compact form."""
    return layer.indices is None


def stored_pieces(layer: SparseLayer) -> list[Piece]:
    """This rank's part of the indices as they are stored; as many pieces on every rank. Collectives: none."""
    if layer.indices is not None:
        return [Piece(layer.values, local_partition(layer.indices), layer.layout.block_elements)]
    return [Piece(parameter, local_partition(parameter)) for parameter in index_parameters(layer).values()]


def indices_of_pieces(layer: SparseLayer, gathered: Sequence[Tensor]) -> Tensor:
    """[`num_active` / e] active indices of the whole layer. Collectives: none.

    Args:
        layer: with blocks of e weights.
        gathered: the whole tensors of `stored_pieces`.
    """
    num_active = layer.num_active // layer.layout.block_elements
    if layer.indices is not None:
        return gathered[0][:num_active]
    low_bytes_S, high_bits = gathered
    layout = layer.layout
    return decode_indices(low_bytes_S[:num_active], high_bits, layout.num_index_slots, layout.index_dtype)


def own_indices(layer: SparseLayer) -> Tensor:
    """[n] integers: the blocks of this rank's slice of the layer's values, 0 behind the active ones; to be read, not
    written.

    Memory: nothing (a view), or, decoded, that of `decode_indices`.
    Collectives: none; with compact indices one all-gather of the bit vector, which every rank must call.
    """
    if layer.indices is not None:
        return local_partition(layer.indices)
    assert layer.index_low_bytes is not None and layer.index_high_bits is not None
    low_bytes_n = local_partition(layer.index_low_bytes)
    (high_bits,) = gather_partitions(
        [layer.index_high_bits], [local_partition(layer.index_high_bits)], layer.index_high_bits.device
    )
    start, num_own = owned_range(layer.values)
    layout = layer.layout
    indices_n = decode_indices(
        low_bytes_n.to(high_bits.device), high_bits, layout.num_index_slots, layout.index_dtype, start=start
    )
    indices_n[max(0, layer.num_active - start) :] = 0
    assert indices_n.numel() == num_own
    return indices_n.to(low_bytes_n.device)


def write_indices(layer: SparseLayer, indices_S: Tensor) -> None:
    """Replace the indices of a layer; every rank gives the whole list and keeps its slice.

    What is gathered at the moment keeps its old content: call `release_gathered` after the last write.

    Args:
        layer: its `num_active` is that of the new indices already.
        indices_S: [`num_index_slots`] of any integer dtype; the active ones unique and ascending, 0 behind them.

    Collectives: none.
    """
    layout = layer.layout
    assert indices_S.shape == (layout.num_index_slots,), f"{tuple(indices_S.shape)} for {layout}"
    num_active = layer.num_active // layout.block_elements
    storage: IndexStorage = "compact" if are_compact(layer) else "int32"
    whole = new_index_tensors(indices_S, layout, num_active, storage)
    for name, parameter in index_parameters(layer).items():
        start, num_real = owned_range(parameter)
        local_partition(parameter).copy_(whole[name][start : start + num_real])
    layer.indices_changed()
