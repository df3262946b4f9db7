"""Estimation phases: what the dense gradient says about inactive weights, in O(K) memory.

A phase is the `estimation_steps` steps before an event. During it every sparse layer shows the gradient of its output
and its input in backward (`SparseLinear.observe_gradient`), and the work is done right there, in the autograd thread:

    gradient, micro_batch    1st micro batch    candidates by the reduced dense gradient, tile by tile
    gradient, step           1st step           reduced dense gradient added up; candidates when the step ends
    both, from then on       every micro batch  gradient at the candidates, reduced to this rank's slice
                             end of a step      sums of g and g^2, times the clip coefficient of the step

    whole phase              every micro batch  reduced dense gradient (or its square) added up
    (selected once)          end of the phase   candidates by the sums

g is the averaged gradient of a whole step, as the optimizer gets it: gradient accumulation does not change its scale.
A step that the engine skips (a gradient that is not finite) does not count; if it was to bring the candidates, the next
one does.

Collectives, few for all matrices together (of sizes bounded by 256 MiB a rank; what is more goes in further ones):

    candidates                   one reduce-scatter per tile in backward; the choice among what was kept at the end of
                                 the backward, see `candidate_search.choose`
    gradient at the candidates   their indices are gathered once a phase; their gradients are added up over the micro
                                 batches and reduced once a step. Matrices that do not fit into 256 MiB: both in
                                 every micro batch

Memory per rank: 12 bytes per candidate / R (index, sums of g and g^2), from a layer's backward to the end of the step 4
more (the step's g), and on several ranks 4 per candidate and in the same time 4 more (indices and gradients of all
ranks), together 256 MiB at most; between phases, and until the candidates are chosen, nothing. Transient: a tile; what
the ranks have kept, 12 bytes per candidate and together 256 MiB at most; in backward of a layer 8 bytes per candidate
of that layer. `step` and the whole phase: 4 * N / R bytes besides.

References: Scaling Sparse Fine-Tuning to Large Language Models (Ansell et al. 2024, arXiv 2401.16405), section 3.2 and
Algorithm 1. Differs from the paper: with `micro_batch` the candidates come from the first micro batch of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor

from sparse_ds.distributed.gradient_tiles import reduce_to_slices
from sparse_ds.distributed.process_group import world_size
from sparse_ds.distributed.zero3_partitions import gather_partitions, owned_range
from sparse_ds.drop_grow.candidate_search import (
    DenseAccumulator,
    Search,
    Tiling,
    choose,
    common_row_bytes,
    search_tiles,
)
from sparse_ds.kernels.dense_row_blocks import RowBoundaries
from sparse_ds.kernels.product_operands import ProductOperands
from sparse_ds.sparse.gradient_at import gradient_at
from sparse_ds.sparse.sparse_linear import SparseLinear

Source = Literal["micro_batch", "step", "phase"]

KEPT_BYTES = 2**28
"""Bound (256 MiB) on what a rank keeps of all matrices besides its slices, so that collectives are few."""


@dataclass
class CandidateSums:
    """This rank's slices of one matrix, like the slices of its values."""

    indices: Tensor
    """[n] candidates: blocks of e weights."""
    gradient: Tensor
    """[n * e] fp32, sum of g over the counted steps of the phase; with source `phase` that by which they were found."""
    gradient_square: Tensor
    """[n * e] fp32, sum of g^2."""


@dataclass(frozen=True)
class _WholeCandidates:
    """All candidates of one matrix, on every rank."""

    indices: Tensor
    """[U], of blocks where the layer has them."""
    row_boundaries: RowBoundaries
    is_kept: bool
    """For the whole phase: the gradients of a step are added up by each rank and reduced at its end."""


class EstimationPhase:
    """Runs the phases of one run.

    Args:
        layers: sparse layers by name, in the same order on every rank.
        source: where candidates come from, see the module docstring.
        squared: sum squares (only with source `phase`).
        tile_bytes: bound on the transient memory of a tile.
        device: of the gradients.
    """

    def __init__(
        self,
        layers: dict[str, SparseLinear],
        *,
        source: Source,
        squared: bool,
        tile_bytes: int,
        device: torch.device,
    ) -> None:
        assert not squared or source == "phase"
        self._layers, self._source, self._squared = layers, source, squared
        self._tile_bytes, self._device = tile_bytes, device
        self._slices: dict[str, slice] = {}
        end = 0
        for name, layer in layers.items():
            begin, end = end, end + owned_range(layer.values)[1]
            self._slices[name] = slice(begin, end)
        self._num_owned = end
        self.num_counted_steps = 0
        """n: steps of the current phase that count so far."""
        self._candidates: dict[str, Tensor] = {}
        self._accumulators: dict[str, DenseAccumulator] = {}
        self._searches: dict[str, Search] = {}
        self._whole: dict[str, _WholeCandidates] = {}
        self._row_bytes = 0
        self.is_running = False
        """Whether a phase has begun whose event has not been yet."""
        self._step_gradients: dict[str, Tensor] = {}
        """[n * e] fp32 of the candidates that this rank owns: g of the step so far, of the layers that have had their
        backward."""
        self._rank_gradients: dict[str, Tensor] = {}
        """[S] fp32 of all candidates: what this rank adds to g of the step, where the ranks' are reduced at its end."""
        self._sum = self._sum_of_squares = torch.empty(0, device=device)
        """Of the candidates that this rank owns, all matrices one after the other; empty until the end of the first
        step, when there are no activations."""

    def begin_step(self) -> None:
        """Before the first micro batch of a step of a phase. Collectives: none."""
        self.is_running = True
        if not self._candidates and self._source != "micro_batch" and not self._accumulators:
            self._accumulators = {
                name: DenseAccumulator(layer, self._tile_bytes, squared=self._squared, device=self._device)
                for name, layer in self._layers.items()
            }
        for name, layer in self._layers.items():
            layer.observe_gradient = partial(self._observe, name)

    def end_step(self, clip_coefficient: float | None) -> None:
        """After the optimizer step.

        Args:
            clip_coefficient: the engine's, None if it skipped the step; the same on every rank.

        Collectives: after the step that brings the candidates those of `candidate_search.choose`, after the others a
        reduce-scatter of their gradients; every rank must call.
        """
        for layer in self._layers.values():
            layer.observe_gradient = None
        if self._source == "phase":
            # What was finite of a skipped step is in the sums already, and stays.
            self.num_counted_steps += clip_coefficient is not None
            return
        if clip_coefficient is None:
            if self.num_counted_steps == 0:
                self._candidates, self._accumulators, self._searches, self._whole = {}, {}, {}, {}
            self._step_gradients, self._rank_gradients = {}, {}
            return
        if self._source == "step" and not self._candidates:
            self._search_accumulators()
        self._finish_searches()
        self._reduce_gradients()
        gradients = self._take_step_gradients()
        torch._foreach_mul_(gradients, clip_coefficient)
        self._make_sums()
        torch._foreach_add_(self._by_layer(self._sum), gradients)
        torch._foreach_addcmul_(self._by_layer(self._sum_of_squares), gradients, gradients)
        self.num_counted_steps += 1

    def finish_phase(self) -> None:
        """Before the event: nothing is left to be found. Collectives: with source `phase` those of `choose`."""
        self._whole = {}
        if self._source == "phase":
            self._search_accumulators()
            self._finish_searches()
            gradients = self._take_step_gradients()
            self._make_sums()
            torch._foreach_add_(self._by_layer(self._sum), gradients)

    def sums(self, name: str) -> CandidateSums:
        """Of one matrix, between `finish_phase` and `forget`."""
        own = self._slices[name]
        return CandidateSums(self._candidates[name], self._sum[own], self._sum_of_squares[own])

    def saved_slices(self) -> dict[str, CandidateSums]:
        """What a checkpoint between two steps of a phase must hold: by tensor name; nothing outside of a phase."""
        return {name: self.sums(name) for name in self._candidates}

    def restore_phase(self, num_counted_steps: int) -> None:
        """Be in a phase of which so many steps have counted: `saved_slices` are then views to write into."""
        self.is_running = True
        self._make_sums()
        self.num_counted_steps = num_counted_steps
        for name, layer in self._layers.items():
            size = owned_range(layer.values)[1] // layer.layout.block_elements
            self._candidates[name] = torch.zeros(size, dtype=layer.layout.index_dtype, device=self._device)

    def forget(self) -> None:
        """After the event: give everything back."""
        self._candidates, self._accumulators, self._searches, self._whole = {}, {}, {}, {}
        self._row_bytes = 0
        self._step_gradients, self._rank_gradients = {}, {}
        self._sum = self._sum_of_squares = torch.empty(0, device=self._device)
        self.is_running = False
        self.num_counted_steps = 0

    def _make_sums(self) -> None:
        if self._sum.numel() < self._num_owned:
            self._sum, self._sum_of_squares = (torch.zeros(self._num_owned, device=self._device) for _ in range(2))

    def _by_layer(self, owned: Tensor) -> list[Tensor]:
        return [owned[own] for own in self._slices.values()]

    def _take_step_gradients(self) -> list[Tensor]:
        """In the order of the layers; 0 for a layer that no micro batch of the step has run."""
        found, self._step_gradients = self._step_gradients, {}
        return [
            found[name] if name in found else torch.zeros(own.stop - own.start, device=self._device)
            for name, own in self._slices.items()
        ]

    def _observe(self, name: str, operands: ProductOperands) -> None:
        """In backward of one layer. Collectives: those named in the module docstring, in the order of the graph."""
        if name in self._accumulators:
            self._accumulators[name].add(operands)
            return
        if self._searches and (name in self._searches or name in self._candidates):
            self._finish_searches()  # the second micro batch of the step that brings the candidates
        if name in self._candidates:
            self._add_gradient(name, operands)
            return
        # Once a phase: all layers of a micro batch see the same tokens.
        self._row_bytes = self._row_bytes or common_row_bytes(operands)
        layer = self._layers[name]
        tiling = Tiling.within(layer.layout, self._tile_bytes, self._row_bytes)
        self._add_search(name, search_tiles(layer, tiling, operands))

    def _search_accumulators(self) -> None:
        for name in self._layers:
            self._add_search(name, self._accumulators.pop(name).search())

    def _add_search(self, name: str, search: Search) -> None:
        held_bytes = sum(held.max_bytes for held in self._searches.values())
        if held_bytes + search.max_bytes > KEPT_BYTES:
            self._finish_searches()
        self._searches[name] = search

    def _finish_searches(self) -> None:
        """Collectives: those of `choose`, if there is a search."""
        searches, self._searches = self._searches, {}
        for name, found in zip(searches, choose(list(searches.values())), strict=True):
            self._candidates[name] = found.indices
            _add(self._step_gradients, name, found.gradient)

    def _add_gradient(self, name: str, operands: ProductOperands) -> None:
        """Collectives: at the first call of a phase one all-gather; for matrices that are not kept whole an all-gather
        and a reduce-scatter."""
        if not self._whole:
            self._whole = self._gather_candidates()
        layer = self._layers[name]
        whole = self._whole.get(name) or self._whole_candidates(name, *self._gather([name]))
        gradient_S = gradient_at(
            layer.layout,
            operands,
            whole.indices,
            whole.row_boundaries,
            choice=layer.path_choice,
            scratch_elements=self._tile_bytes // 16,
        )
        if whole.is_kept:
            _add(self._rank_gradients, name, gradient_S)
        else:
            _add(self._step_gradients, name, *reduce_to_slices([layer.values], [gradient_S]))

    def _gather_candidates(self) -> dict[str, _WholeCandidates]:
        """The matrices that fit into KEPT_BYTES, in their order. Collectives: one all-gather with several ranks."""
        if world_size() == 1:
            return {name: self._whole_candidates(name, own) for name, own in self._candidates.items()}
        names, kept_bytes = [], 0
        for name in self._layers:
            kept_bytes += self._whole_bytes(name)
            if kept_bytes > KEPT_BYTES:
                break
            names.append(name)
        if not names:
            return {}
        return {
            name: self._whole_candidates(name, indices_U, is_kept=True)
            for name, indices_U in zip(names, self._gather(names), strict=True)
        }

    def _gather(self, names: list[str]) -> list[Tensor]:
        """All candidates of some matrices. Collectives: one all-gather."""
        layers = [self._layers[name] for name in names]
        return gather_partitions(
            [layer.values for layer in layers],
            [self._candidates[name] for name in names],
            self._device,
            [layer.layout.block_elements for layer in layers],
        )

    def _whole_bytes(self, name: str) -> int:
        layout = self._layers[name].layout
        return layout.grid.num_slots * layout.index_dtype.itemsize + 4 * layout.num_slots

    def _whole_candidates(self, name: str, indices: Tensor, *, is_kept: bool = False) -> _WholeCandidates:
        layout = self._layers[name].layout
        indices_U = indices[: layout.grid.num_slots]
        return _WholeCandidates(indices_U, cache(partial(layout.row_boundaries, indices_U)), is_kept)

    def _reduce_gradients(self) -> None:
        """Collectives: one reduce-scatter, if candidates are kept whole."""
        names = [name for name, whole in self._whole.items() if whole.is_kept]
        if not names:
            return
        gradients = [
            self._rank_gradients.pop(name)
            if name in self._rank_gradients
            else torch.zeros(self._layers[name].layout.num_slots, device=self._device)
            for name in names
        ]
        for name, own in zip(names, reduce_to_slices([self._layers[n].values for n in names], gradients), strict=True):
            _add(self._step_gradients, name, own)


def _add(sums: dict[str, Tensor], name: str, term: Tensor) -> None:
    """Takes over the first term."""
    if name in sums:
        sums[name].add_(term)
    else:
        sums[name] = term
