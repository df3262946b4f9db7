"""One drop-and-grow event over all target tensors of a ZeRO-3 model.

    for each batch of tensors (about 256 MiB of gathered data):
        gather      indices, master values and per-weight optimizer state of all ranks        one all-gather
        select      dropped and grown weights of each tensor      every rank computes the same: no communication
        write       this rank's slice of the new indices, values and state                    local
    release         all gathered parameters: they hold the old contents
    compare         a sha256 over the new indices of all tensors                              one small gather

The inputs of the selection are gathered or all-reduced, so they are bit-identical on every rank; so is the outcome, and
the comparison proves it. A rank that would decide otherwise stops the run instead of letting the ranks drift apart.

Reference: Scaling Sparse Fine-Tuning to Large Language Models (Ansell et al. 2024, arXiv 2401.16405), section 3.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparse_ds.distributed.zero3_partitions import (
    MasterWeights,
    batches_to_gather,
    gather_partitions,
    local_partition,
    owned_range,
    require_equal,
)
from sparse_ds.selection.apply_event import EventResult, carry_over
from sparse_ds.sparse.index_hash import IndexHash
from sparse_ds.sparse.layout import SparseLayout
from sparse_ds.sparse.sparse_linear import SparseLinear


class Selector(Protocol):
    """Decides one tensor's event from global data only, identically on every rank, without communication."""

    def __call__(
        self, name: str, layout: SparseLayout, indices_K: Tensor, values_K: Tensor, num_to_replace: int
    ) -> EventResult: ...


@dataclass(frozen=True)
class EventRecord:
    """What one event did; `index_hash` identifies the indices of all tensors after it."""

    step: int
    num_dropped: int
    num_grown: int
    num_active: int
    index_hash: str
    wall_s: float


class DropAndGrow:
    """Runs events.

    Args:
        layers: the sparse layers by module name, in the same order on every rank.
        master: the engine's master weights.
        weight_states: optimizer state per active weight, each a list of flat tensors like `master.flats`; kept with
            the weights that stay, zero for grown ones.
        selector: the method's decision.
        device: where to gather and select.
    """

    def __init__(
        self,
        layers: dict[str, SparseLinear],
        master: MasterWeights,
        weight_states: Sequence[Sequence[Tensor]],
        selector: Selector,
        device: torch.device,
    ) -> None:
        self._layers, self._master, self._weight_states = layers, master, weight_states
        self._selector, self._device = selector, device

    def run(self, step: int, num_to_replace: dict[str, int]) -> EventRecord:
        """Exchange up to `num_to_replace[name]` weights of each tensor.

        The caller releases gathered parameters afterwards (`engine.empty_partition_cache()`): until then a gathered
        parameter holds its old contents.

        Collectives: one all-gather per batch of tensors, then one small gather; every rank must call it at the same
        step. Raises RuntimeError on every rank if the ranks do not agree.
        """
        started = time.perf_counter()
        num_dropped = 0
        index_hash = IndexHash()
        for batch in batches_to_gather(self._layers, self._bytes_of):
            for name, tensors in zip(batch, self._gather(batch), strict=True):
                result = self._selector(name, self._layers[name].layout, tensors[0], tensors[1], num_to_replace[name])
                self._write(name, result, tensors)
                num_dropped += result.num_replaced
                index_hash.add(name, result.indices)
        require_equal(index_hash.hexdigest(), f"the set of active weights after the event at step {step}")
        return EventRecord(
            step=step,
            num_dropped=num_dropped,
            num_grown=num_dropped,
            num_active=sum(layer.layout.num_active for layer in self._layers.values()),
            index_hash=index_hash.hexdigest(),
            wall_s=time.perf_counter() - started,
        )

    def _bytes_of(self, name: str) -> int:
        layout = self._layers[name].layout
        return layout.num_active * (layout.index_dtype.itemsize + 4 * (1 + len(self._weight_states)))

    def _gather(self, batch: list[str]) -> list[list[Tensor]]:
        """Per tensor: [indices, values, states...], each [K] and global."""
        parameters, partitions = [], []
        for name in batch:
            layer = self._layers[name]
            parameters += [layer.indices] + [layer.values] * (1 + len(self._weight_states))
            partitions += [local_partition(layer.indices), self._master.view(layer.values)]
            partitions += [self._master.view(layer.values, state) for state in self._weight_states]
        gathered = gather_partitions(parameters, partitions, self._device)
        width = 2 + len(self._weight_states)
        return [gathered[i * width : (i + 1) * width] for i in range(len(batch))]

    def _write(self, name: str, result: EventResult, tensors: list[Tensor]) -> None:
        layer = self._layers[name]
        start, num_real = owned_range(layer.values)
        own = slice(start, start + num_real)
        source = result.source[own]
        local_partition(layer.indices).copy_(result.indices[own])
        self._master.write_values(layer.values, carry_over(tensors[1], source))
        for state, state_K in zip(self._weight_states, tensors[2:], strict=True):
            self._master.view(layer.values, state).copy_(carry_over(state_K, source))
