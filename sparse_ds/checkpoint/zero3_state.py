"""What a run must remember of a ZeRO-3 engine, named and global: this rank's slices to save, and to restore into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from sparse_ds.checkpoint.reading import Checkpoint
from sparse_ds.checkpoint.tensor_file import DTYPES
from sparse_ds.checkpoint.writing import SavedSlice
from sparse_ds.config.errors import UserError
from sparse_ds.distributed.zero3_partitions import MasterWeights, full_size, local_partition, owned_range
from sparse_ds.sparse.index_storage import are_compact, own_indices, write_indices
from sparse_ds.sparse.sparse_linear import SparseLayer


@dataclass(frozen=True)
class StateItem:
    """One saved tensor, sliced over the ranks like a parameter."""

    name: str
    parameter: Parameter
    """Whose slicing applies."""
    local: Tensor
    """This rank's slice, a view to write into; real elements only."""
    num_elements: int
    """Elements that are saved: the active weights. The slots behind them are 0."""
    limit: int = 0
    """Of integers: they are from 0 to below this."""
    ascending: bool = False
    """Of integers: each is larger than the one before, over all ranks."""
    unit: int = 1
    """Elements of the parameter that one element of the tensor stands for: of a list of blocks of weights."""
    is_master: bool = False
    """The slice is one of the master weights: the copy that is gathered is written with it."""
    compact_layer: SparseLayer | None = None
    """Of indices that are stored compactly: whose they are. `local` is then a decoded copy, or nothing to restore."""

    @property
    def own_range(self) -> tuple[int, int]:
        """(start, number) of the saved elements that this rank owns."""
        start, num_slots = (number // self.unit for number in owned_range(self.parameter))
        return start, max(0, min(num_slots, self.num_elements - start))

    def saved(self) -> SavedSlice:
        """To be written."""
        part = self.local[: self.own_range[1]]
        slice_elements = self.parameter.ds_tensor.ds_numel // self.unit
        return SavedSlice.of_rank(self.name, part, self.num_elements, slice_elements)


def state_items(
    layers: Mapping[str, SparseLayer],
    dense: Mapping[str, Parameter],
    master: MasterWeights,
    weight_states: Mapping[str, Sequence[Tensor]],
    num_steps: int,
    *,
    to_restore: bool,
) -> list[StateItem]:
    """All tensors that train and their state, in the same order on every rank.

    Args:
        layers: sparse layers by module name.
        dense: trainable parameters outside sparse layers, by name.
        master: the engine's master weights.
        weight_states: state name -> flat tensors like `master.flats` (`exp_avg`, ...); integers among them are steps.
        num_steps: the largest of them there can be.
        to_restore: they are to be written into, else saved.

    Memory: to save compact indices 4 bytes per active weight of this rank's part; else nothing (views).
    Collectives: none; to save compact indices one all-gather a layer, see `own_indices`.
    """
    items = [_indices_item(name, layer, to_restore) for name, layer in layers.items()]
    trained = {f"{name}.values": layer.values for name, layer in layers.items()} | dict(dense)
    num_active = {f"{name}.values": layer.num_active for name, layer in layers.items()}
    for name, parameter in trained.items():
        size = num_active.get(name, full_size(parameter))
        items.append(StateItem(name, parameter, master.view(parameter), size, is_master=True))
        stem = name.removesuffix(".values") if name in num_active else name
        for state, flats in weight_states.items():
            view = master.view(parameter, flats)
            items.append(StateItem(f"{stem}.{state}", parameter, view, size, limit=num_steps + 1))
    return items


def _indices_item(name: str, layer: SparseLayer, to_restore: bool) -> StateItem:
    layout = layer.layout
    decodes_nothing = to_restore and are_compact(layer)
    return StateItem(
        f"{name}.indices",
        layer.values,
        torch.empty(0, dtype=layout.index_dtype) if decodes_nothing else own_indices(layer),
        layer.num_active // layout.block_elements,
        limit=layout.num_positions,
        ascending=True,
        unit=layout.block_elements,
        compact_layer=layer if are_compact(layer) else None,
    )


def restore_items(items: Sequence[StateItem], checkpoint: Checkpoint) -> None:
    """Every rank reads its own slices, and of compact indices all. The caller releases gathered parameters afterwards.

    Memory: the largest slice; with compact indices those of the largest matrix.
    Collectives: none.

    Raises:
        UserError: a tensor is missing, has another size or dtype, or holds what it cannot hold. Some tensors may have
            been written by then: the run must end.
    """
    for item in items:
        check_entry(checkpoint, item.name, item.local.dtype, item.num_elements)
        # What a rank holds of a bit vector depends on the indices of others.
        start, number = item.own_range if item.compact_layer is None else (0, item.num_elements)
        # With the last element of the rank before, so that all ranks together have compared all neighbours.
        before = 1 if item.ascending and start and number else 0
        piece = checkpoint.read(item.name, start - before, number + before) if number else item.local[:0]
        problem = find_problem(piece, item.limit, item.ascending)
        if problem:
            raise UserError(f"checkpoint {checkpoint.folder}: tensor {item.name!r} {problem}. Use another checkpoint.")
        if item.compact_layer is not None:
            num_slots = item.compact_layer.layout.num_index_slots
            write_indices(item.compact_layer, F.pad(piece, (0, num_slots - number)))
            continue
        targets = [item.local, local_partition(item.parameter)] if item.is_master else [item.local]
        for target in targets:
            target[:number].copy_(piece[before:])
            target[number:].zero_()


def check_entry(checkpoint: Checkpoint, name: str, dtype: torch.dtype, num_elements: int) -> None:
    """Raises UserError unless the checkpoint has this tensor of this dtype and size."""
    entry = checkpoint.entry(name)
    if (entry.dtype, entry.num_elements) != (DTYPES[dtype], num_elements):
        raise UserError(
            f"checkpoint {checkpoint.folder}: tensor {name!r} has {entry.num_elements} elements of {entry.dtype}, "
            f"expected {num_elements} of {DTYPES[dtype]}; it was written by another run or is damaged."
        )


def find_problem(piece: Tensor, limit: int = 0, ascending: bool = False) -> str | None:
    """What a run could not use: numbers that are not finite, integers outside of 0 .. limit - 1 or out of order."""
    if piece.numel() == 0 or piece.dtype == torch.uint8:
        return None
    if piece.dtype.is_floating_point:
        return None if bool(piece.isfinite().all()) else "holds numbers that are not finite"
    lowest, highest = (int(x) for x in torch.aminmax(piece))
    if lowest < 0 or highest >= limit:
        return f"holds {lowest if lowest < 0 else highest}, expected 0 to {limit - 1}"
    if ascending and not bool((piece[1:] > piece[:-1]).all()):
        return "is not in ascending order"
    return None
