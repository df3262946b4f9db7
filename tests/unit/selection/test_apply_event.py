"""New indices and the source map: nothing lost, nothing twice, state follows its weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_ds.selection.apply_event import apply_event, carry_over


@given(data=st.data(), numel=st.integers(1, 60), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_state_follows_its_weight(data: st.DataObject, numel: int, dtype: torch.dtype) -> None:
    active = sorted(data.draw(st.sets(st.integers(0, numel - 1))))
    inactive = [i for i in range(numel) if i not in active]
    dropped = data.draw(st.sets(st.sampled_from(active))) if active else set()
    # Grown weights come from the inactive ones and from those dropped in the same event.
    pool = inactive + sorted(dropped)
    grown = data.draw(st.permutations(pool))[: len(dropped)]
    indices = torch.tensor(active, dtype=dtype)
    values = torch.arange(1, len(active) + 1, dtype=torch.float32)

    result = apply_event(
        indices,
        torch.tensor(sorted(active.index(i) for i in dropped), dtype=torch.int64),
        torch.tensor(grown, dtype=torch.int64),
    )

    assert result.indices.dtype == dtype and result.source.dtype == torch.int64
    assert result.indices.tolist() == sorted((set(active) - dropped) | set(grown))
    assert len(result.indices) == len(active)
    value_of = dict(zip(active, values.tolist(), strict=True))
    expected = [value_of.get(i, 0.0) for i in result.indices.tolist()]
    assert carry_over(values, result.source).tolist() == expected
    assert result.num_replaced == len(set(grown) - dropped)
    # A rank carries over only its own slots.
    assert carry_over(values, result.source[1:3]).tolist() == expected[1:3]


def test_grown_slots_do_not_inherit_nan() -> None:
    result = apply_event(torch.tensor([2, 4]), torch.tensor([0]), torch.tensor([3]))
    assert carry_over(torch.tensor([float("nan"), 5.0]), result.source).tolist() == [0.0, 5.0]


def test_growing_an_active_weight_is_refused() -> None:
    with pytest.raises(AssertionError, match="grown twice, or while it stayed active"):
        apply_event(torch.tensor([2, 4]), torch.tensor([0]), torch.tensor([4]))
    with pytest.raises(AssertionError, match="grown twice, or while it stayed active"):
        apply_event(torch.tensor([2, 4]), torch.tensor([0, 1]), torch.tensor([7, 7]))


@given(data=st.data(), numel=st.integers(1, 40))
def test_more_or_fewer_may_grow_than_are_dropped(data: st.DataObject, numel: int) -> None:
    active = sorted(data.draw(st.sets(st.integers(0, numel - 1), min_size=1)))
    dropped = data.draw(st.sets(st.sampled_from(active)))
    pool = sorted(set(range(numel)) - (set(active) - dropped))
    grown = data.draw(st.sets(st.sampled_from(pool))) if pool else set()
    result = apply_event(
        torch.tensor(active, dtype=torch.int32),
        torch.tensor(sorted(active.index(i) for i in dropped), dtype=torch.int64),
        torch.tensor(sorted(grown), dtype=torch.int64),
    )
    assert result.indices.tolist() == sorted((set(active) - dropped) | grown)
    assert result.indices.numel() == len(active) - len(dropped) + len(grown)
    assert [active[slot] if slot >= 0 else None for slot in result.source.tolist()] == [
        i if i in active else None for i in result.indices.tolist()
    ]
    assert result.num_replaced == len(grown - set(active))
    values = torch.arange(1.0, len(active) + 1)
    value_of = dict(zip(active, values.tolist(), strict=True))
    assert carry_over(values, result.source).tolist() == [value_of.get(i, 0.0) for i in result.indices.tolist()]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_matrix_without_active_weights_can_grow_some(dtype: torch.dtype) -> None:
    """Redistribution can take the last one away and bring others later."""
    nothing = torch.empty(0, dtype=dtype)
    result = apply_event(nothing, nothing.long(), torch.tensor([3, 5]))
    assert result.indices.dtype == dtype and result.indices.tolist() == [3, 5]
    assert result.source.tolist() == [-1, -1] and result.num_replaced == 2
    assert carry_over(torch.empty(0), result.source).tolist() == [0.0, 0.0]
