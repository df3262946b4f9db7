"""A uniform choice among free positions, against sets."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_ds.selection.random_growth import random_inactive
from sparse_ds.selection.random_subset import random_subset


@given(data=st.data(), num_elements=st.integers(1, 40), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_free_positions_only(data: st.DataObject, num_elements: int, dtype: torch.dtype) -> None:
    occupied = sorted(data.draw(st.sets(st.integers(0, num_elements - 1))))
    free = sorted(set(range(num_elements)) - set(occupied))
    count = data.draw(st.integers(0, len(free)))
    drawn = random_inactive(num_elements, torch.tensor(occupied, dtype=dtype), count, seed=0, name="w", step=5)
    assert drawn.dtype == torch.int64 and drawn.shape == (count,)
    assert sorted(set(drawn.tolist())) == drawn.tolist()
    assert set(drawn.tolist()) <= set(free)
    if count == len(free):
        assert drawn.tolist() == free


def test_all_choices_are_equally_likely() -> None:
    occupied, free, rounds = torch.tensor([0, 3, 4, 8]), [1, 2, 5, 6, 7], 3000
    counts = Counter(
        tuple(random_inactive(9, occupied, 2, seed=0, name="w", step=t).tolist()) for t in range(1, rounds + 1)
    )
    choices = list(itertools.combinations(free, 2))
    assert set(counts) == set(choices)
    expected = rounds / len(choices)
    chi_square = sum((counts[choice] - expected) ** 2 / expected for choice in choices)
    degrees = len(choices) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_seed_name_and_step_give_independent_draws() -> None:
    none = torch.empty(0, dtype=torch.int32)
    draws = [
        random_inactive(10_000, none, 1000, seed=seed, name=name, step=step)
        for seed, name, step in [(0, "a", 5), (1, "a", 5), (0, "b", 5), (0, "a", 25), (0, "a5", 5)]
    ]
    draws.append(random_subset(10_000, 1000, seed=0, name="a"))
    for one, other in itertools.combinations(draws, 2):
        shared = int(torch.isin(one, other).sum())
        assert 60 <= shared <= 140, "two independent tenths share a hundredth: 100 +- 4 standard deviations of 9"


def test_golden_draw() -> None:
    drawn = random_inactive(1000, torch.arange(0, 1000, 2), 6, seed=0, name="w", step=25)
    assert drawn.tolist() == [153, 269, 457, 515, 591, 879]


def test_a_large_matrix_needs_no_more_than_the_occupied_positions() -> None:
    occupied = torch.arange(0, 2**33, 2**20)
    drawn = random_inactive(2**33, occupied, 5000, seed=0, name="w", step=5)
    assert drawn.unique().numel() == 5000 and int(drawn[-1]) > 2**32
    assert not bool(torch.isin(drawn, occupied).any())


def test_more_than_free_is_refused() -> None:
    with pytest.raises(AssertionError, match="cannot draw 3 of 2 free positions"):
        random_inactive(4, torch.tensor([1, 2]), 3, seed=0, name="w", step=5)
