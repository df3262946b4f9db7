"""One-shot selection by the accumulated gradient: the weights of largest |sum of gradients| are chosen once.

The sum runs over the first `method.estimation_steps` steps, in which nothing trains. It is SFT-AG's growth score for
every weight of the matrix instead of candidates, at the pretrained model.
"""

from __future__ import annotations

from torch import Tensor

from sparse_ds.selection.evidence import Evidence, Growable
from sparse_ds.selection.growable import best_candidates

FACTS = {
    "summary": "the weights of largest accumulated gradient, chosen once",
    "optimizer": "adamw",
    "events": "once",
    "statistic": "gradient",
}


def growable(evidence: Evidence, staying: Tensor, limit: int) -> Growable:
    """The candidates: already the weights of largest statistic."""
    return best_candidates(evidence, staying, limit)
