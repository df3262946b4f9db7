"""The smallest |values| against a sort of (|value|, index)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_ds.selection.drop import smallest_magnitude


@given(data=st.data(), values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 1e-45, -3e38]), max_size=40))
def test_equals_the_sort(data: st.DataObject, values: list[float]) -> None:
    k = data.draw(st.integers(0, len(values)))
    indices = data.draw(st.permutations(range(0, 3 * len(values), 3)))
    by_rank = sorted(range(len(values)), key=lambda p: (abs(values[p]), indices[p]))
    dropped = smallest_magnitude(torch.tensor(values), torch.tensor(indices, dtype=torch.int32), k)
    assert dropped.dtype == torch.int64
    assert dropped.tolist() == sorted(by_rank[:k])


@given(seed=st.integers(0, 10_000))
def test_equals_the_sort_without_ties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(97, generator=generator)
    k = int(torch.randint(0, 98, (), generator=generator))
    expected = values.abs().argsort(stable=True)[:k].sort().values
    assert torch.equal(smallest_magnitude(values, torch.arange(97), k), expected)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(RuntimeError, match="1 of 3 values are not finite"):
        smallest_magnitude(torch.tensor([1.0, float("nan"), 0.0]), torch.arange(3), 1)


def test_more_than_all_is_refused() -> None:
    with pytest.raises(AssertionError, match="cannot drop 4 of 3"):
        smallest_magnitude(torch.ones(3), torch.arange(3), 4)
