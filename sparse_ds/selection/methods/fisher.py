"""Empirical Fisher information: the weights of largest summed squared gradient are chosen once, before training.

The sum runs over the micro batches of all ranks of the first `method.estimation_steps` steps, in which nothing trains.

Reference: Training Neural Networks with Fixed Sparse Masks (Sung et al. 2021, arXiv 2111.09839), section 3.
Differs from the paper: the square is of a micro batch's share of the step's mean loss; with `train.micro_batch_size` 1
that is the paper's square per sample. K is per matrix, not over the whole model.
"""

from __future__ import annotations

from torch import Tensor

from sparse_ds.selection.evidence import Evidence, Growable
from sparse_ds.selection.growable import best_candidates

FACTS = {
    "summary": "the weights of largest empirical Fisher information, chosen once (Sung et al. 2021, arXiv 2111.09839)",
    "optimizer": "adamw",
    "events": "once",
    "statistic": "gradient_square",
}


def growable(evidence: Evidence, staying: Tensor, limit: int) -> Growable:
    """The candidates: already the weights of largest statistic."""
    return best_candidates(evidence, staying, limit)
