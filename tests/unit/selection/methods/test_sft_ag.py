"""One SFT-AG event against sets, sorts and a countdown in plain Python."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ds.selection.apply_event import EventResult, carry_over
from sparse_ds.selection.evidence import Evidence
from sparse_ds.selection.registry import find_growth, select
from sparse_ds.sparse.layout import SparseLayout

SCORES = st.sampled_from([0.0, 0.5, 1.0, 1e-45, 3e38])


def run_event(
    indices: torch.Tensor,
    drop_scores: torch.Tensor,
    candidates: torch.Tensor,
    candidate_scores: torch.Tensor,
    k: int,
    numel: int = 10,
) -> EventResult:
    layout = SparseLayout(1, numel, indices.numel())
    return select(find_growth("sft_ag"), Evidence("w", layout, indices, drop_scores, candidates, candidate_scores), k)


@settings(max_examples=400)
@given(data=st.data(), numel=st.integers(1, 30), dtypes=st.permutations([torch.int32, torch.int64]), same=st.booleans())
def test_event_by_the_rules(data: st.DataObject, numel: int, dtypes: list[torch.dtype], same: bool) -> None:
    active = sorted(data.draw(st.sets(st.integers(0, numel - 1))))
    num_candidates = len(active) if same else data.draw(st.integers(0, numel))
    candidates = sorted(data.draw(st.permutations(range(numel)))[:num_candidates])
    k = data.draw(st.integers(0, len(active)))
    drop_scores = data.draw(st.lists(SCORES, min_size=len(active), max_size=len(active)))
    scores = data.draw(st.lists(SCORES, min_size=num_candidates, max_size=num_candidates))

    result = run_event(
        torch.tensor(active, dtype=dtypes[0]),
        torch.tensor(drop_scores),
        torch.tensor(candidates, dtype=dtypes[1]),
        torch.tensor(scores),
        k,
        numel,
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
        result = run_event(indices, drop_scores, torch.tensor([0, 9]), torch.ones(2), k)
        assert result.indices.tolist() == expected


def test_the_first_event_makes_the_candidates_the_active_weights() -> None:
    """All are dropped, and with as many candidates all of these grow; what is among both keeps its slot."""
    result = run_event(torch.tensor([0, 2, 4]), torch.zeros(3), torch.tensor([2, 5, 9]), torch.zeros(3), 3)
    assert result.indices.tolist() == [2, 5, 9] and result.source.tolist() == [1, -1, -1]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_candidate_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(RuntimeError, match="w: scores of candidates are not finite: the training has diverged"):
        run_event(torch.arange(2), torch.ones(2), torch.arange(2), torch.tensor([1.0, bad]), 1)


def test_drop_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(RuntimeError, match="1 of 2 values are not finite: the training has diverged"):
        run_event(torch.arange(2), torch.tensor([1.0, math.nan]), torch.arange(2), torch.ones(2), 1)


def test_broken_arguments_are_refused() -> None:
    with pytest.raises(AssertionError, match="grown twice"):
        run_event(torch.arange(2), torch.ones(2), torch.tensor([3, 3]), torch.ones(2), 2)
    with pytest.raises(AssertionError, match="cannot drop 3 of 2"):
        run_event(torch.arange(2), torch.ones(2), torch.arange(2), torch.ones(2), 3)
    evidence = Evidence("w", SparseLayout(1, 4, 2), torch.arange(2), torch.ones(2))
    for incomplete in (evidence, replace(evidence, candidates=torch.arange(2))):
        with pytest.raises(AssertionError, match="w: no candidates"):
            select(find_growth("sft_ag"), incomplete, 1)
