"""What a method sees when it decides about one matrix, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sparse_ds.sparse.layout import SparseLayout


@dataclass(frozen=True)
class Evidence:
    """Global data about one matrix, bit-identical on every rank.

    Attributes:
        name: the target layer.
        layout: its shape.
        indices: [K] active weights, ascending.
        drop_scores: [K] fp32, >= 0; the smallest are dropped: |value|, or |change since the last event|.
        candidates: [C] ascending, dtype of `indices`; None without candidates.
        candidate_scores: [C] fp32, >= 0; the largest grow.
        row_acc, col_acc: [O], [I] fp32 accumulators of SM3; None with another optimizer.
        step, seed: of the event and of the run, for random choices.
        random_growth_fraction: share of the growth that is drawn at random.
    """

    name: str
    layout: SparseLayout
    indices: Tensor
    drop_scores: Tensor
    candidates: Tensor | None = None
    candidate_scores: Tensor | None = None
    row_acc: Tensor | None = None
    col_acc: Tensor | None = None
    step: int = 0
    seed: int = 0
    random_growth_fraction: float = 0.0

    @property
    def accumulators(self) -> tuple[Tensor, Tensor]:
        """(row_acc, col_acc), of a method that has them."""
        assert self.row_acc is not None and self.col_acc is not None, f"{self.name}: no accumulators"
        return self.row_acc, self.col_acc

    @property
    def scored_candidates(self) -> tuple[Tensor, Tensor]:
        """(candidates, candidate_scores), of a method that has them."""
        assert self.candidates is not None and self.candidate_scores is not None, f"{self.name}: no candidates"
        return self.candidates, self.candidate_scores


class Growable(NamedTuple):
    """The weights that may grow, best first cut: no other one is better."""

    indices: Tensor
    """[n] int64, ascending, unique."""
    scores: Tensor
    """[n] fp64, >= 0; comparable between matrices."""
