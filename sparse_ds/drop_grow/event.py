"""One drop-and-grow event over all target tensors of a ZeRO-3 model.

    for each batch of tensors (about 256 MiB of gathered data):
        gather      indices, master values, state per weight, sums of the candidates          one all-gather
        select      dropped and grown weights of each tensor      every rank computes the same: no communication
        write       this rank's slice of the new indices, values and state                    local
    release         all gathered parameters: they hold the old contents
    compare         a sha256 over the new indices of all tensors                              one small gather

The inputs of the selection are gathered or all-reduced, so they are bit-identical on every rank; so is the outcome, and
the comparison proves it. A rank that would decide otherwise stops the run instead of letting the ranks drift apart.

With redistribution a first pass over the same batches only asks what could grow, and `redistribution.allot` decides how
many weights each tensor gets.

Reference: Scaling Sparse Fine-Tuning to Large Language Models (Ansell et al. 2024, arXiv 2401.16405), section 3.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_ds.distributed.process_group import rank, world_size
from sparse_ds.distributed.zero3_partitions import (
    MasterWeights,
    batches_to_gather,
    gather_partitions,
    owned_range,
    require_equal,
)
from sparse_ds.drop_grow.estimation import EstimationPhase
from sparse_ds.drop_grow.redistribution import Allotment, allot
from sparse_ds.drop_grow.weight_states import States, WeightStates
from sparse_ds.selection.apply_event import EventResult, carry_over
from sparse_ds.selection.drop import smallest_magnitude
from sparse_ds.selection.evidence import Evidence
from sparse_ds.selection.registry import Growth, select, select_resized, without
from sparse_ds.sparse.index_hash import IndexHash
from sparse_ds.sparse.index_storage import Piece, indices_of_pieces, stored_pieces, write_indices
from sparse_ds.sparse.sparse_linear import SparseLinear

Accumulators = Callable[[str], tuple[Tensor, Tensor]]
"""name -> (row, col) accumulators of SM3."""


class Seeds(NamedTuple):
    """With what state a grown weight begins."""

    betas: tuple[float, float] | None
    """AdamW's, to seed its moments with those of a weight that has had the gradients of the phase; None: with 0."""
    birth_step: int
    """Applied steps at which the age of the grown weights is 0."""


@dataclass(frozen=True)
class TensorRecord:
    """What one event did to one tensor, and how its active weights lie after it."""

    num_replaced: int
    num_active: int
    num_rows: int
    """Rows that hold an active weight."""
    num_cols: int


@dataclass(frozen=True)
class EventRecord:
    """What one event did; `index_hash` identifies the indices of all tensors after it."""

    step: int
    num_dropped: int
    num_grown: int
    num_active: int
    index_hash: str
    wall_s: float
    tensors: dict[str, TensorRecord]
    birth_steps: dict[int, int]
    """Applied steps at which the age was 0 -> active weights after the event that have been there since."""


@dataclass(frozen=True)
class _Gathered:
    """One tensor, global, as every rank sees it: U blocks of e weights, values and states [U * e]."""

    indices: Tensor
    values: Tensor
    states: dict[str, Tensor]
    sums: tuple[Tensor, Tensor, Tensor] | None
    """Candidates, sum of g, sum of g^2."""


class DropAndGrow:
    """Runs events.

    Args:
        layers: the sparse layers by module name, in the same order on every rank.
        master: the engine's master weights.
        weight_states: kept with the weights that stay; grown ones begin with 0 or the seeds.
        growth: the method's.
        estimation: whose candidates may grow; None for a method without candidates.
        accumulators: SM3's; None for a method without them.
        seed: of the run.
        random_growth_fraction: share of the growth that is drawn at random.
        redistributes: weights may move between tensors.
        device: where to gather and select.
    """

    def __init__(
        self,
        layers: dict[str, SparseLinear],
        master: MasterWeights,
        weight_states: WeightStates,
        growth: Growth,
        *,
        estimation: EstimationPhase | None,
        accumulators: Accumulators | None,
        seed: int,
        random_growth_fraction: float,
        redistributes: bool,
        device: torch.device,
    ) -> None:
        self._layers, self._master, self._weight_states = layers, master, weight_states
        self._growth, self._estimation, self._accumulators = growth, estimation, accumulators
        self._seed, self._random_growth_fraction = seed, random_growth_fraction
        self._redistributes, self._device = redistributes, device

    def run(self, step: int, num_to_replace: dict[str, int], seeds: Seeds) -> EventRecord:
        """Exchange up to `num_to_replace[name]` blocks (of one weight by default) of each tensor.

        The caller releases gathered parameters afterwards (`release_gathered`): until then a gathered
        parameter holds its old contents.

        Collectives: those of `EstimationPhase.finish_phase`, one all-gather per batch of tensors (two with
        redistribution), then one small gather; every rank must call it at the same step. Raises RuntimeError on every
        rank if the ranks do not agree.
        """
        started = time.perf_counter()
        if self._estimation is not None:
            self._estimation.finish_phase()
            if self._estimation.num_counted_steps == 0:
                num_to_replace = dict.fromkeys(num_to_replace, 0)
        states = self._weight_states.read()
        allotment = None
        if self._redistributes and any(num_to_replace.values()):
            allotment = self._allot(step, num_to_replace, states)
        tensors: dict[str, TensorRecord] = {}
        births: Counter[int] = Counter()
        index_hash = IndexHash()
        for name, gathered in self._gather_all(states):
            evidence = self._evidence(name, step, gathered)
            if allotment is None:
                result = select(self._growth, evidence, num_to_replace[name])
            else:
                result = select_resized(
                    self._growth, evidence, allotment.num_to_drop[name], allotment.num_to_grow[name]
                )
            births += self._write(name, result, gathered, states, seeds)
            index_hash.add(name, self._layers[name].layout.sorted_weights(result.indices)[0])
            tensors[name] = self._describe(name, result)
        self._weight_states.write(states)
        if self._estimation is not None:
            self._estimation.forget()
        require_equal(index_hash.hexdigest(), f"the set of active weights after the event at step {step}")
        num_replaced = sum(tensor.num_replaced for tensor in tensors.values())
        return EventRecord(
            step=step,
            num_dropped=num_replaced,
            num_grown=num_replaced,
            num_active=sum(tensor.num_active for tensor in tensors.values()),
            index_hash=index_hash.hexdigest(),
            wall_s=time.perf_counter() - started,
            tensors=tensors,
            birth_steps=dict(sorted(births.items())),
        )

    def _allot(self, step: int, num_to_drop: dict[str, int], states: States) -> Allotment | None:
        """How many weights each tensor drops and grows, by the growth scores of all tensors."""
        scores, room = {}, {}
        for name, gathered in self._gather_all(states):
            evidence = self._evidence(name, step, gathered)
            dropped = smallest_magnitude(evidence.drop_scores, evidence.indices, num_to_drop[name])
            staying = without(evidence.indices, dropped)
            room[name] = self._layers[name].layout.grid.num_slots - staying.numel()
            scores[name] = self._growth(evidence, staying, room[name]).scores
            # Every rank has all of them: it keeps its share, so that all tensors' scores together are O(K / R).
            scores[name] = scores[name][rank() :: world_size()].clone()
        return allot(num_to_drop, scores)

    def _evidence(self, name: str, step: int, gathered: _Gathered) -> Evidence:
        layout = self._layers[name].layout
        row_acc = col_acc = None
        if self._accumulators is not None:
            row_acc, col_acc = (acc.to(self._device) for acc in self._accumulators(name))
            row_acc, col_acc = layout.sums_of_lines(row_acc, col_acc)
        changes = gathered.values
        if "event_value" in gathered.states:
            changes = gathered.values - gathered.states["event_value"]
        return Evidence(
            name=name,
            layout=layout.grid,
            indices=gathered.indices,
            drop_scores=layout.block_sums(changes.abs()),
            candidates=None if gathered.sums is None else gathered.sums[0],
            candidate_scores=None if gathered.sums is None else layout.block_sums(gathered.sums[1].abs()),
            row_acc=row_acc,
            col_acc=col_acc,
            step=step,
            seed=self._seed,
            random_growth_fraction=self._random_growth_fraction,
        )

    def _gather_all(self, states: States) -> Iterator[tuple[str, _Gathered]]:
        """Every tensor, a batch gathered at a time."""
        for batch in batches_to_gather(self._layers, lambda name: self._bytes_of(name, len(states))):
            own = {name: self._pieces(name, states) for name in batch}
            pieces = [piece for of_tensor in own.values() for piece in of_tensor]
            gathered = gather_partitions(
                [piece.parameter for piece in pieces],
                [piece.partition for piece in pieces],
                self._device,
                [piece.unit for piece in pieces],
            )
            position = 0
            for name, of_tensor in own.items():
                yield name, self._unpack(name, gathered[position : position + len(of_tensor)], states)
                position += len(of_tensor)

    def _pieces(self, name: str, states: States) -> list[Piece]:
        """In the order in which `_unpack` takes them."""
        layer = self._layers[name]
        values = layer.values
        pieces = [Piece(values, self._master.view(values))]
        pieces += [Piece(values, self._master.view(values, flats)) for flats in states.values()]
        if self._has_sums:
            assert self._estimation is not None
            sums = self._estimation.sums(name)
            pieces.append(Piece(values, sums.indices, layer.layout.block_elements))
            pieces += [Piece(values, sums.gradient), Piece(values, sums.gradient_square)]
        return pieces + stored_pieces(layer)

    @property
    def _has_sums(self) -> bool:
        return self._estimation is not None and self._estimation.num_counted_steps > 0

    def _unpack(self, name: str, tensors: list[Tensor], states: States) -> _Gathered:
        layer, sums = self._layers[name], None
        values, *rest = (tensor[: layer.num_active] for tensor in tensors[: 1 + len(states)])
        tensors = tensors[1 + len(states) :]
        if self._has_sums:
            (candidates, gradient, square), tensors = tensors[:3], tensors[3:]
            num_slots = layer.layout.num_slots
            sums = candidates[: layer.layout.grid.num_slots], gradient[:num_slots], square[:num_slots]
        return _Gathered(indices_of_pieces(layer, tensors), values, dict(zip(states, rest, strict=True)), sums)

    def _bytes_of(self, name: str, num_states: int) -> int:
        layout = self._layers[name].layout
        num_sums = 3 if self._has_sums else 0
        return layout.num_stored * (layout.index_dtype.itemsize + 4 * (1 + num_states + num_sums))

    def _write(self, name: str, result: EventResult, gathered: _Gathered, states: States, seeds: Seeds) -> Counter[int]:
        """Returns the birth steps of the tensor's active weights after the event, counted."""
        layer = self._layers[name]
        start, num_real = owned_range(layer.values)
        own = slice(start, start + num_real)
        block = layer.layout.block_elements
        layer.num_active = result.indices.numel() * block
        values = carry_over(gathered.values.view(-1, block), result.source)
        new_states = {state: carry_over(old.view(-1, block), result.source) for state, old in gathered.states.items()}
        self._seed_grown(result, gathered, new_states, seeds)
        if "event_value" in new_states:
            new_states["event_value"] = values
        layout = layer.layout
        write_indices(layer, _padded(result.indices, layout.num_index_slots))
        self._master.write_values(layer.values, _padded(values.view(-1), layout.num_stored)[own])
        for state, new in new_states.items():
            self._master.view(layer.values, states[state]).copy_(_padded(new.view(-1), layout.num_stored)[own])
        steps, counts = torch.unique(new_states["birth_step"], return_counts=True)
        return Counter(dict(zip(steps.tolist(), counts.tolist(), strict=True)))

    def _seed_grown(
        self, result: EventResult, gathered: _Gathered, new_states: dict[str, Tensor], seeds: Seeds
    ) -> None:
        """State [U, e] of the grown blocks, in place: as if their gradients of the phase had gone into the moments."""
        grown = (result.source < 0).nonzero().view(-1)
        new_states["birth_step"][grown] = seeds.birth_step
        if seeds.betas is None or gathered.sums is None:
            return
        assert self._estimation is not None
        num_steps = self._estimation.num_counted_steps
        candidates, gradient_sum, square_sum = gathered.sums
        places = torch.searchsorted(candidates, result.indices[grown])
        beta1, beta2 = seeds.betas
        block = new_states["exp_avg"].shape[1]
        gradient_sum, square_sum = gradient_sum.view(-1, block), square_sum.view(-1, block)
        new_states["exp_avg"][grown] = gradient_sum[places] * ((1 - beta1**num_steps) / num_steps)
        new_states["exp_avg_sq"][grown] = square_sum[places] * ((1 - beta2**num_steps) / num_steps)

    def _describe(self, name: str, result: EventResult) -> TensorRecord:
        layout = self._layers[name].layout
        grid = layout.grid
        num_cols = torch.bincount(grid.cols_of(result.indices.long()), minlength=1).count_nonzero()
        return TensorRecord(
            num_replaced=result.num_replaced * layout.block_elements,
            num_active=result.indices.numel() * layout.block_elements,
            num_rows=torch.unique_consecutive(grid.rows_of(result.indices)).numel() * layout.block_rows,
            num_cols=int(num_cols) * layout.block_cols,
        )


def _padded(active: Tensor, size: int) -> Tensor:
    """[size] with zeros behind the active ones."""
    padded = active.new_zeros(size)
    padded[: active.numel()] = active
    return padded
