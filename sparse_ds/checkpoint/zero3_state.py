"""What a run must remember of a ZeRO-3 engine, named and global: gathered to save, cut into slices to restore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from sparse_ds.checkpoint.folder import Checkpoint, CheckpointWriter
from sparse_ds.config.errors import UserError
from sparse_ds.distributed.zero3_partitions import (
    MasterWeights,
    batches_to_gather,
    full_size,
    gather_partitions,
    local_partition,
    owned_range,
)
from sparse_ds.sparse.sparse_linear import SparseLayer


@dataclass(frozen=True)
class StateItem:
    """One saved tensor: its name, the parameter whose slicing applies, and this rank's slice (a view to write into)."""

    name: str
    parameter: Parameter
    local: Tensor
    is_master: bool = False
    """The slice is one of the master weights: the copy that is gathered is written with it."""


def state_items(
    layers: Mapping[str, SparseLayer],
    dense: Mapping[str, Parameter],
    master: MasterWeights,
    weight_states: Mapping[str, Sequence[Tensor]],
) -> list[StateItem]:
    """All tensors that train and their state, in the same order on every rank.

    Args:
        layers: sparse layers by module name.
        dense: trainable parameters outside sparse layers, by name.
        master: the engine's master weights.
        weight_states: state name -> flat tensors like `master.flats` (`exp_avg`, ...).
    """
    items: list[StateItem] = []
    trained = {f"{name}.values": layer.values for name, layer in layers.items()} | dict(dense)
    for name, layer in layers.items():
        items.append(StateItem(f"{name}.indices", layer.indices, local_partition(layer.indices)))
    for name, parameter in trained.items():
        items.append(StateItem(name, parameter, master.view(parameter), is_master=True))
        stem = name.removesuffix(".values")
        for state, flats in weight_states.items():
            items.append(StateItem(f"{stem}.{state}", parameter, master.view(parameter, flats)))
    return items


def save_items(items: Sequence[StateItem], writer: CheckpointWriter | None, device: torch.device) -> Exception | None:
    """Gather everything; the rank with a writer writes it.

    A write that fails (disk full) does not end the gathering, so that no rank is left waiting.

    Returns:
        The first error of the writer, for the ranks to agree on.
    Memory: a batch of tensors twice on `device`, one shard on the writing rank's host.
    Collectives: one all-gather per batch; every rank must call it.
    """
    failure: Exception | None = None
    for batch in batches_to_gather(items, lambda item: full_size(item.parameter) * item.local.element_size()):
        gathered = gather_partitions([item.parameter for item in batch], [item.local for item in batch], device)
        if writer is None or failure is not None:
            continue
        try:
            for item, tensor in zip(batch, gathered, strict=True):
                writer.add(item.name, tensor)
        except Exception as error:
            failure = error
    return failure


def restore_items(items: Sequence[StateItem], checkpoint: Checkpoint) -> None:
    """Every rank reads its own slices. The caller releases gathered parameters afterwards. Collectives: none.

    Raises:
        UserError: a tensor is missing or has another size.
    """
    for item in items:
        if item.name not in checkpoint.names or checkpoint.num_elements(item.name) != full_size(item.parameter):
            found = checkpoint.num_elements(item.name) if item.name in checkpoint.names else "nothing"
            raise UserError(
                f"checkpoint {checkpoint.folder}: tensor {item.name!r} has {found} elements, expected "
                f"{full_size(item.parameter)}; it was written by another run or is damaged."
            )
        start, num_real = owned_range(item.parameter)
        piece = checkpoint.read(item.name, start, num_real)
        item.local.copy_(piece)
        if item.is_master:
            local_partition(item.parameter).copy_(piece)
