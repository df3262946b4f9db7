"""SFT-AG: grow by the accumulated gradient of candidates, drop what moved least.

Reference: Scaling Sparse Fine-Tuning to Large Language Models (Ansell et al. 2024, arXiv 2401.16405), section 3.2.
"""

from __future__ import annotations

from torch import Tensor

from sparse_ds.selection.evidence import Evidence, Growable
from sparse_ds.selection.growable import best_candidates

FACTS = {
    "summary": "accumulated gradients of candidates decide (Ansell et al. 2024, arXiv 2401.16405), AdamW",
    "optimizer": "adamw",
    "events": "repeated",
    "statistic": "gradient",
    "keys": ("candidate_source",),
}


def growable(evidence: Evidence, staying: Tensor, limit: int) -> Growable:
    """The candidates of largest |sum of gradients| that are not staying active.

    A candidate may be a weight that is being dropped: if it grows again, it keeps its value and state.
    """
    return best_candidates(evidence, staying, limit)
