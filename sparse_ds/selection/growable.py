"""The best candidates that are not staying active."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ds.selection.evidence import Evidence, Growable


def best_candidates(evidence: Evidence, staying: Tensor, limit: int) -> Growable:
    """The up to `limit` candidates of largest score, ties by ascending index, that are not in `staying`.

    Memory: O(C). Time: O(C log C).

    Args:
        evidence: with candidates.
        staying: [n] active weights that stay, ascending.
        limit: >= 0.

    Raises:
        RuntimeError: a score is not finite.
    """
    candidates, scores = evidence.scored_candidates
    if not bool(scores.isfinite().all()):
        raise RuntimeError(f"{evidence.name}: scores of candidates are not finite: the training has diverged")
    eligible = ~is_member(candidates, staying)
    candidates, scores = candidates[eligible].long(), scores[eligible].double()
    # A stable sort of ascending indices leaves ties in their order.
    best = scores.sort(descending=True, stable=True).indices[:limit].sort().values
    return Growable(candidates[best], scores[best])


def is_member(queries: Tensor, ascending: Tensor) -> Tensor:
    """[n] bool: which of `queries` are in `ascending` (unique)."""
    if ascending.numel() == 0:
        return torch.zeros(queries.numel(), dtype=torch.bool, device=queries.device)
    ascending = ascending.to(queries.dtype)
    places = torch.searchsorted(ascending, queries).clamp_(max=ascending.numel() - 1)
    return ascending[places] == queries
