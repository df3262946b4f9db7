"""How many weights each tensor grows when events may move weights between tensors.

Every tensor drops as many as it would anyway. The weights so freed go where the growth scores are largest over all
tensors together, as far as a tensor has room. The total stays.

The k-th largest score is found by a radix search over all ranks (`selection.largest_keys`): no rank ever holds the
scores of all tensors. Scores that are equal to it go to the tensors in their order.

The idea is named as future work in Scaling Sparse Fine-Tuning to Large Language Models (Ansell et al. 2024, arXiv
2401.16405); keeping the total while tensors compete is that of RigL and of its predecessors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_ds.distributed.gradient_tiles import sum_over_ranks
from sparse_ds.selection.largest_keys import kth_largest_score


class Allotment(NamedTuple):
    """Weights by tensor name; the sums of both are equal."""

    num_to_drop: dict[str, int]
    num_to_grow: dict[str, int]


def allot(num_to_drop: dict[str, int], scores: dict[str, Tensor]) -> Allotment | None:
    """Share the dropped weights out among the tensors.

    Args:
        num_to_drop: of each tensor; not 0 for all.
        scores: this rank's share of the growth scores of each tensor, fp64, finite, >= 0; the ranks' shares together
            are the best that the tensor has room for.

    Returns:
        None if all tensors together cannot grow as many as they drop: then every tensor keeps its number.

    Collectives: eight small all-reduces; every rank must call it.
    """
    device = next(iter(scores.values())).device
    total = sum(num_to_drop.values())
    num_growable = sum_over_ranks(torch.tensor([score.numel() for score in scores.values()], device=device))
    if int(num_growable.sum()) < total:
        return None
    threshold = kth_largest_score(torch.cat(list(scores.values())), total, sum_over_ranks)
    counts = [[int((score > threshold).sum()), int((score == threshold).sum())] for score in scores.values()]
    num_above, num_tied = sum_over_ranks(torch.tensor(counts, device=device)).t().tolist()
    rest = total - sum(num_above)
    num_to_grow = {}
    for name, above, tied in zip(scores, num_above, num_tied, strict=True):
        taken = min(tied, rest)
        num_to_grow[name], rest = above + taken, rest - taken
    return Allotment(num_to_drop, num_to_grow)
