"""One SFT-AG event against sets, sorts and a countdown in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ds.selection.apply_event import carry_over
from sparse_ds.selection.sft_ag import select_sft_ag

SCORES = st.sampled_from([0.0, 0.5, 1.0, 1e-45, 3e38])


@settings(max_examples=400)
@given(data=st.data(), numel=st.integers(1, 30), dtypes=st.permutations([torch.int32, torch.int64]), same=st.booleans())
def test_event_by_the_rules(data: st.DataObject, numel: int, dtypes: list[torch.dtype], same: bool) -> None:
    active = sorted(data.draw(st.sets(st.integers(0, numel - 1))))
    num_candidates = len(active) if same else data.draw(st.integers(0, numel))
    candidates = sorted(data.draw(st.permutations(range(numel)))[:num_candidates])
    k = data.draw(st.integers(0, len(active)))
    drop_scores = data.draw(st.lists(SCORES, min_size=len(active), max_size=len(active)))
    scores = data.draw(st.lists(SCORES, min_size=num_candidates, max_size=num_candidates))

    result = select_sft_ag(
        torch.tensor(active, dtype=dtypes[0]),
        torch.tensor(drop_scores),
        torch.tensor(candidates, dtype=dtypes[1]),
        torch.tensor(scores),
        k,
    )

    by_drop_score = sorted(active, key=lambda i: (drop_scores[active.index(i)], i))
    for num in range(k, -1, -1):
        dropped = set(by_drop_score[:num])
        eligible = [c for c in candidates if c not in set(active) - dropped]
        if len(eligible) >= num:
            break
    if same:
        assert num == k, "with as many candidates as active weights there are always enough"
    grown = set(sorted(eligible, key=lambda c: (-scores[candidates.index(c)], c))[:num])
    staying = set(active) - dropped
    kept_value = staying | (grown & dropped)
    values = {index: 1.0 + position for position, index in enumerate(active)}
    assert result.indices.dtype == dtypes[0]
    assert result.indices.tolist() == sorted(staying | grown)
    assert result.num_replaced == len(grown - dropped)
    assert carry_over(torch.tensor(list(values.values())), result.source).tolist() == [
        values[i] if i in kept_value else 0.0 for i in result.indices.tolist()
    ]


def test_too_few_candidates_shrink_the_drop() -> None:
    """Candidates 0 and 9; 0 is active and would be dropped third. So 2 and 4 need one candidate each: there is 9."""
    indices, drop_scores = torch.tensor([0, 2, 4, 6]), torch.tensor([3.0, 1.0, 2.0, 4.0])
    for k, expected in [(0, [0, 2, 4, 6]), (1, [0, 4, 6, 9]), (2, [0, 4, 6, 9]), (4, [0, 4, 6, 9])]:
        result = select_sft_ag(indices, drop_scores, torch.tensor([0, 9]), torch.ones(2), k)
        assert result.indices.tolist() == expected


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    good, broken = torch.ones(2), torch.tensor([1.0, bad])
    with pytest.raises(RuntimeError, match="1 of 2 drop scores are not finite: the training has diverged"):
        select_sft_ag(torch.arange(2), broken, torch.arange(2), good, 1)
    with pytest.raises(RuntimeError, match="1 of 2 candidate scores are not finite"):
        select_sft_ag(torch.arange(2), good, torch.arange(2), broken, 1)


def test_broken_arguments_are_refused() -> None:
    with pytest.raises(AssertionError, match="candidates are not unique and ascending"):
        select_sft_ag(torch.arange(2), torch.ones(2), torch.tensor([3, 3]), torch.ones(2), 1)
    with pytest.raises(AssertionError, match="drop scores are negative"):
        select_sft_ag(torch.arange(2), -torch.ones(2), torch.arange(2), torch.ones(2), 1)
    with pytest.raises(AssertionError, match="cannot drop 3 of 2"):
        select_sft_ag(torch.arange(2), torch.ones(2), torch.arange(2), torch.ones(2), 3)
