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

Memory per rank: 16 bytes per candidate / R (index, step's g, sums of g and g^2), between phases nothing. Transient: a
tile; in backward of a layer 8 bytes per candidate of that layer. `step` and the whole phase: 4 * N / R bytes besides.

References: Scaling Sparse Fine-Tuning to Large Language Models (Ansell et al. 2024, arXiv 2401.16405), section 3.2 and
Algorithm 1. Differs from the paper: with `micro_batch` the candidates come from the first micro batch of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sparse_ds.distributed.gradient_tiles import gather_slices, reduce_to_slices
from sparse_ds.distributed.zero3_partitions import owned_range
from sparse_ds.drop_grow.candidate_search import Candidates, DenseAccumulator, TileSearch
from sparse_ds.kernels.product_operands import ProductOperands
from sparse_ds.sparse.gradient_at import gradient_at
from sparse_ds.sparse.sparse_linear import SparseLinear

Source = Literal["micro_batch", "step", "phase"]


@dataclass
class CandidateSums:
    """This rank's slices of one matrix, like the slices of its values."""

    indices: Tensor
    """[n] candidates: blocks of e weights."""
    gradient: Tensor
    """[n * e] fp32, sum of g over the counted steps of the phase; with source `phase` that by which they were found."""
    gradient_square: Tensor
    """[n * e] fp32, sum of g^2."""


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
        self._step_gradient = self._sum = self._sum_of_squares = torch.empty(0, device=device)

    @property
    def is_running(self) -> bool:
        """Whether a phase has begun whose event has not been yet."""
        return self._sum.numel() > 0 or bool(self._accumulators)

    def begin_step(self) -> None:
        """Before the first micro batch of a step of a phase. Collectives: none."""
        if not self.is_running:
            self._begin_phase()
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

        Collectives: with source `step`, after the first step, those of `candidate_search.choose`; every rank must call.
        """
        for layer in self._layers.values():
            layer.observe_gradient = None
        if self._source == "phase":
            # What was finite of a skipped step is in the sums already, and stays.
            self.num_counted_steps += clip_coefficient is not None
            return
        if clip_coefficient is None:
            if self.num_counted_steps == 0:
                self._candidates, self._accumulators = {}, {}
            self._step_gradient.zero_()
            return
        if self._source == "step" and not self._candidates:
            for name in self._layers:
                self._take_candidates(name, self._accumulators.pop(name).find())
        self._step_gradient.mul_(clip_coefficient)
        self._sum.add_(self._step_gradient)
        self._sum_of_squares.addcmul_(self._step_gradient, self._step_gradient)
        self._step_gradient.zero_()
        self.num_counted_steps += 1

    def finish_phase(self) -> None:
        """Before the event: nothing is left to be found. Collectives: with source `phase` those of `choose`."""
        if self._source == "phase":
            for name in self._layers:
                self._take_candidates(name, self._accumulators.pop(name).find())
            self._sum.add_(self._step_gradient)
            self._step_gradient.zero_()

    def sums(self, name: str) -> CandidateSums:
        """Of one matrix, between `finish_phase` and `forget`."""
        own = self._slices[name]
        return CandidateSums(self._candidates[name], self._sum[own], self._sum_of_squares[own])

    def saved_slices(self) -> dict[str, CandidateSums]:
        """What a checkpoint between two steps of a phase must hold: by tensor name; nothing outside of a phase."""
        return {name: self.sums(name) for name in self._candidates}

    def restore_phase(self, num_counted_steps: int) -> None:
        """Be in a phase of which so many steps have counted: `saved_slices` are then views to write into."""
        self._begin_phase()
        self.num_counted_steps = num_counted_steps
        for name, layer in self._layers.items():
            size = owned_range(layer.values)[1] // layer.layout.block_elements
            self._candidates[name] = torch.zeros(size, dtype=layer.layout.index_dtype, device=self._device)

    def forget(self) -> None:
        """After the event: give everything back."""
        self._candidates, self._accumulators = {}, {}
        self._step_gradient = self._sum = self._sum_of_squares = torch.empty(0, device=self._device)
        self.num_counted_steps = 0

    def _begin_phase(self) -> None:
        # One element at least, so that a rank that owns nothing is in the phase like the others.
        self._step_gradient, self._sum, self._sum_of_squares = (
            torch.zeros(max(self._num_owned, 1), device=self._device) for _ in range(3)
        )

    def _observe(self, name: str, operands: ProductOperands) -> None:
        """In backward of one layer. Collectives: those named in the module docstring, in the order of the graph."""
        layer = self._layers[name]
        if name in self._accumulators:
            self._accumulators[name].add(operands)
        elif name not in self._candidates:
            self._take_candidates(name, TileSearch(layer, self._tile_bytes).find(operands))
        else:
            layout = layer.layout
            indices_U = gather_slices(layer.values, self._candidates[name], layout.block_elements)
            indices_U = indices_U[: layout.grid.num_slots]
            gradient_S = gradient_at(
                layout,
                operands,
                indices_U,
                partial(layout.row_boundaries, indices_U),
                choice=layer.path_choice,
                scratch_elements=self._tile_bytes // 16,
            )
            self._step_gradient[self._slices[name]].add_(reduce_to_slices(layer.values, gradient_S))

    def _take_candidates(self, name: str, found: Candidates) -> None:
        self._candidates[name] = found.indices
        self._step_gradient[self._slices[name]].add_(found.gradient)
