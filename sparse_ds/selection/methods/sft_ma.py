"""SFT-MA: grow by the product of SM3's row and column accumulators, drop what moved least.

The accumulators see active weights only. A row or column without any scores 0 and never grows again, so that the active
weights gather in ever fewer rows and columns (support collapse). Against this, a share of every growth may be drawn at
random (`method.random_growth_fraction`): random weights give their rows and columns a score of their own.

Reference: Scaling Sparse Fine-Tuning to Large Language Models (Ansell et al. 2024, arXiv 2401.16405), section 3.3.
Differs from the paper: the random share; and weights grow among those inactive before the drop, so that none is both
dropped and grown.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from sparse_ds.selection.evidence import Evidence, Growable
from sparse_ds.selection.outer_topk import outer_product_topk
from sparse_ds.selection.random_growth import random_inactive

FACTS = {
    "summary": "row and column maxima of SM3 decide (Ansell et al. 2024, arXiv 2401.16405)",
    "optimizer": "sm3",
    "events": "repeated",
    "keys": ("random_growth_fraction",),
}


def growable(evidence: Evidence, staying: Tensor, limit: int) -> Growable:
    """The weights of largest row x column accumulator among those that were inactive before the event."""
    row_acc, col_acc = evidence.accumulators
    num_inactive = evidence.layout.num_elements - evidence.indices.numel()
    limit = min(limit, num_inactive)
    num_random = int(Fraction(str(evidence.random_growth_fraction)) * limit)
    indices = outer_product_topk(row_acc, col_acc, evidence.indices, limit - num_random)
    if num_random:
        occupied = torch.cat([evidence.indices.long(), indices]).sort().values
        drawn = random_inactive(
            evidence.layout.num_elements,
            occupied,
            num_random,
            seed=evidence.seed,
            name=evidence.name,
            step=evidence.step,
        )
        indices = torch.cat([indices, drawn.to(indices.device)]).sort().values
    scores = row_acc.double()[evidence.layout.rows_of(indices)] * col_acc.double()[evidence.layout.cols_of(indices)]
    return Growable(indices, scores)
