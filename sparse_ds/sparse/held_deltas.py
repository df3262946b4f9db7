"""Deltas that stay in the weights for a whole micro batch, where nothing of the base is partitioned.

With several ranks the merged weight exists only while it is gathered, so every product puts the deltas in and takes
them out: twice a micro batch, three times with activation checkpointing. With one rank the gathered weight is the
rank's own partition, and once is enough: before the forward pass they go in, after the backward pass they come out. The
products in between are those of a dense model, bit for bit the same as with deltas put in one by one. Between micro
batches the base in memory is always the base; whoever looks at it (events, checkpoints, held-out loss, the guard of the
base) need not know of this.

A 4-bit base is dequantized for each product, and is not held; nor are deltas with compact indices, which would have to
be kept decoded meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from sparse_ds.distributed.zero3_partitions import is_whole, local_partition
from sparse_ds.kernels.apply_deltas import deltas_applied
from sparse_ds.sparse.sparse_linear import SparseLinear


def layers_that_can_hold(layers: Iterable[nn.Module], device: torch.device) -> list[SparseLinear]:
    """Those sparse layers over a dense base whose weight is whole on this rank, on the device that computes; [] with
    several ranks."""
    return [
        layer
        for layer in layers
        if isinstance(layer, SparseLinear)
        and layer.weight is not None
        and layer.indices is not None
        and is_whole(layer.weight, device)
    ]


@contextmanager
def deltas_held(layers: Iterable[SparseLinear]) -> Iterator[None]:
    """Within the context the weights of these layers hold their deltas; on exit they are as before, also on errors.

    Values and indices must not change within a product's forward and backward, as ever. (The optimizer may step at the
    end of the context: what is taken out is not computed, but written back.)

    Memory: one weight saved for each active one, and of blocks the positions of their strips; no dense copy.
    Collectives: none.

    Args:
        layers: from `layers_that_can_hold`.
    """
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_held(layer))
        yield


@contextmanager
def _held(layer: SparseLinear) -> Iterator[None]:
    assert layer.weight is not None and layer.indices is not None
    weight_OI = local_partition(layer.weight).view(layer.layout.num_rows, layer.layout.num_cols)
    indices_U = local_partition(layer.indices)[: layer.num_active // layer.layout.block_elements]
    deltas = layer.in_strips(indices_U, local_partition(layer.values)[: layer.num_active])
    with deltas_applied(weight_OI, *deltas):
        layer.held_weight = weight_OI
        try:
            yield
        finally:
            layer.held_weight = None
