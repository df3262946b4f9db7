"""Which active weights an event drops: those that moved least from their pretrained value."""

from __future__ import annotations

import torch
from torch import Tensor


def smallest_magnitude(values_K: Tensor, indices_K: Tensor, k: int) -> Tensor:
    """Positions of the k smallest |values|, ties by ascending index.

    Memory: O(K). Time: O(K) (and a sort of the entries tied with the last one dropped).

    Args:
        values_K: [K] floating point.
        indices_K: [K] int32 or int64, unique.
        k: 0 <= k <= K.

    Returns:
        [k] int64 positions in `values_K`, ascending.

    Raises:
        RuntimeError: a value is not finite.
    """
    assert 0 <= k <= values_K.numel(), f"cannot drop {k} of {values_K.numel()} weights"
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=values_K.device)
    magnitudes = values_K.detach().abs()
    num_bad = int((~magnitudes.isfinite()).sum())
    if num_bad:
        raise RuntimeError(f"{num_bad} of {values_K.numel()} values are not finite: the training has diverged")
    threshold = magnitudes.kthvalue(k).values
    below = (magnitudes < threshold).nonzero().view(-1)
    tied = (magnitudes == threshold).nonzero().view(-1)
    by_index = indices_K[tied].argsort()[: k - below.numel()]
    return torch.cat([below, tied[by_index]]).sort().values
