"""What every event must keep, whatever method decided: properties of the result, not of the choice.

The choices themselves are compared with plain sorts in the tests of each file.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_ds.selection.apply_event import EventResult, apply_event, carry_over
from sparse_ds.selection.evidence import Evidence
from sparse_ds.selection.random_growth import random_inactive
from sparse_ds.selection.registry import find_growth, select
from sparse_ds.selection.sft_ag import select_sft_ag
from sparse_ds.sparse.layout import SparseLayout

DROP_SCORES = st.one_of(st.sampled_from([0.0, 1.0, 1e-45]), st.floats(0, 2.0**100, width=32))
SCORES = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 2.0**100, width=32))


@st.composite
def evidences(draw: st.DrawFn) -> Evidence:
    """A matrix with any active weights, candidates and scores, full of ties or without any."""
    num_rows, num_cols = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    positions = st.integers(0, num_rows * num_cols - 1)
    active = sorted(draw(st.sets(positions)))
    candidates = sorted(draw(st.sets(positions)))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))

    def scores(elements: st.SearchStrategy[float], count: int) -> Tensor:
        return torch.tensor(draw(st.lists(elements, min_size=count, max_size=count)), dtype=torch.float32)

    return Evidence(
        name="w",
        layout=SparseLayout(num_rows, num_cols, len(active)),
        indices=torch.tensor(active, dtype=dtype),
        drop_scores=scores(DROP_SCORES, len(active)),
        candidates=torch.tensor(candidates, dtype=dtype),
        candidate_scores=scores(SCORES, len(candidates)),
        row_acc=scores(SCORES, num_rows),
        col_acc=scores(SCORES, num_cols),
        step=draw(st.integers(1, 1000)),
        seed=draw(st.integers(0, 2**32)),
        random_growth_fraction=draw(st.sampled_from([0.0, 0.3, 1.0])),
    )


def check_event(evidence: Evidence, result: EventResult, k: int) -> None:
    """K constant, unique, ascending, in range; at most k replaced; what stays or comes back keeps its slot's state."""
    old, new, source = evidence.indices, result.indices, result.source
    num_active = old.numel()
    assert new.dtype == old.dtype and new.shape == old.shape
    assert source.dtype == torch.int64 and source.shape == old.shape
    assert bool((new[1:] > new[:-1]).all())
    assert num_active == 0 or (int(new[0]) >= 0 and int(new[-1]) < evidence.layout.num_elements)
    has_source = source >= 0
    assert torch.equal(old[source[has_source]], new[has_source]), "state moved to another weight"
    assert source[has_source].unique().numel() == int(has_source.sum())
    assert not bool(torch.isin(new[~has_source], old).any()), "an active weight was grown as if it were new"
    assert result.num_replaced == int((~has_source).sum()) <= k
    # Those that left are among the k of smallest drop score.
    may_leave = old[torch.sort(evidence.drop_scores, stable=True).indices[:k]]
    left = old[~torch.isin(old, new)]
    assert left.numel() == result.num_replaced
    assert bool(torch.isin(left, may_leave).all())
    # Grown weights start at 0, all others keep their value.
    values = torch.arange(1.0, num_active + 1)
    assert torch.equal(carry_over(values, source) == 0, ~has_source)


@settings(max_examples=200)
@given(data=st.data(), evidence=evidences(), method=st.sampled_from(["sft_ag", "sft_ma"]))
def test_events_keep_the_invariants(data: st.DataObject, evidence: Evidence, method: str) -> None:
    k = data.draw(st.integers(0, evidence.indices.numel()))
    result = select(find_growth(method), evidence, k)
    check_event(evidence, result, k)
    again = select(find_growth(method), evidence, k)
    assert torch.equal(result.indices, again.indices) and torch.equal(result.source, again.source)
    grown = result.indices[result.source < 0]
    if method == "sft_ag":
        assert bool(torch.isin(grown, evidence.candidates).all())
    else:
        num_inactive = evidence.layout.num_elements - evidence.indices.numel()
        assert result.num_replaced == min(k, num_inactive)


@settings(max_examples=200)
@given(data=st.data(), evidence=evidences())
def test_sft_ag_in_one_go_is_sft_ag_by_trial(data: st.DataObject, evidence: Evidence) -> None:
    k = data.draw(st.integers(0, evidence.indices.numel()))
    candidates, scores = evidence.scored_candidates
    result = select_sft_ag(evidence.indices, evidence.drop_scores, candidates, scores, k)
    check_event(evidence, result, k)
    by_trial = select(find_growth("sft_ag"), evidence, k)
    assert torch.equal(result.indices, by_trial.indices) and torch.equal(result.source, by_trial.source)


@settings(max_examples=100)
@given(data=st.data(), evidence=evidences())
def test_with_as_many_candidates_as_active_weights_none_is_missing(data: st.DataObject, evidence: Evidence) -> None:
    """Then the number of weights that leave the candidates' set and the number that may enter are the same."""
    num_active, num_elements = evidence.indices.numel(), evidence.layout.num_elements
    candidates = sorted(data.draw(st.permutations(range(num_elements)))[:num_active])
    evidence = replace(
        evidence,
        candidates=torch.tensor(candidates, dtype=evidence.indices.dtype),
        candidate_scores=torch.ones(num_active),
    )
    # At the first event everything is dropped, so the candidates are the new weights.
    result = select(find_growth("sft_ag"), evidence, num_active)
    assert result.indices.tolist() == candidates


@settings(max_examples=200)
@given(data=st.data(), evidence=evidences())
def test_any_drop_and_growth_can_be_applied(data: st.DataObject, evidence: Evidence) -> None:
    """`apply_event` with arbitrary decisions, in any order."""
    active = evidence.indices.tolist()
    k = data.draw(st.integers(0, len(active)))
    dropped = data.draw(st.permutations(range(len(active))))[:k]
    staying = {index for slot, index in enumerate(active) if slot not in dropped}
    pool = [i for i in range(evidence.layout.num_elements) if i not in staying]
    grown = data.draw(st.permutations(pool))[:k]
    result = apply_event(
        evidence.indices, torch.tensor(dropped, dtype=torch.int64), torch.tensor(grown, dtype=torch.int64)
    )
    drop_scores = torch.ones(len(active)).index_fill(0, torch.tensor(dropped, dtype=torch.int64), 0.0)
    check_event(replace(evidence, drop_scores=drop_scores), result, k)
    assert set(result.indices.tolist()) == staying | set(grown)


@settings(max_examples=200)
@given(data=st.data(), evidence=evidences())
def test_random_growth_takes_free_positions(data: st.DataObject, evidence: Evidence) -> None:
    num_elements, occupied = evidence.layout.num_elements, evidence.indices
    count = data.draw(st.integers(0, num_elements - occupied.numel()))
    drawn = random_inactive(num_elements, occupied, count, seed=evidence.seed, name="w", step=evidence.step)
    assert drawn.dtype == torch.int64 and drawn.shape == (count,)
    assert bool((drawn[1:] > drawn[:-1]).all())
    assert count == 0 or (int(drawn[0]) >= 0 and int(drawn[-1]) < num_elements)
    assert not bool(torch.isin(drawn, occupied).any())
    again = random_inactive(num_elements, occupied.long(), count, seed=evidence.seed, name="w", step=evidence.step)
    assert torch.equal(drawn, again)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["sft_ag", "sft_ma"])
def test_diverged_scores_stop_the_event(method: str, bad: float) -> None:
    broken = torch.tensor([1.0, bad])
    evidence = Evidence("w", SparseLayout(2, 2, 2), torch.tensor([0, 2]), torch.ones(2), torch.tensor([1, 2]), broken)
    with pytest.raises(RuntimeError, match="diverged"):
        select(find_growth(method), replace(evidence, row_acc=broken, col_acc=torch.ones(2)), 1)
