"""How the indices of a sparse layer are read and written outside of its products.

    layer.active_indices          [K] of the gathered layer: in forward and backward
    own_indices(layer)            this rank's slice, as `values` is partitioned; gathered or not
    write_indices(layer, all)     each rank gives the whole list and keeps its slice: events

Nobody else looks at `layer.indices`.
"""

from __future__ import annotations

from torch import Tensor

from sparse_ds.distributed.zero3_partitions import local_partition, owned_range
from sparse_ds.sparse.sparse_linear import SparseLayer


def own_indices(layer: SparseLayer) -> Tensor:
    """[n] integers: the blocks of this rank's slice of the layer's values; to be read, not written.

    Collectives: none.
    """
    return local_partition(layer.indices)


def write_indices(layer: SparseLayer, indices_S: Tensor) -> None:
    """Replace the indices of a layer; every rank gives the whole list and keeps its slice.

    What is gathered at the moment keeps its old content: call `release_gathered` after the last write.

    Args:
        layer: its `num_active` is that of the new indices already.
        indices_S: [`num_index_slots`] of any integer dtype; the active ones unique and ascending, 0 behind them.

    Collectives: none.
    """
    assert indices_S.shape == (layer.layout.num_index_slots,), f"{tuple(indices_S.shape)} for {layer.layout}"
    start, num_real = owned_range(layer.indices)
    local_partition(layer.indices).copy_(indices_S[start : start + num_real])
    layer.indices_changed()
