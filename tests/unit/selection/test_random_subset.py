"""The initial subset: exact size, uniform, and the same numbers in every version of the libraries."""

from __future__ import annotations

import hashlib
import itertools
import time
import tracemalloc
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_ds.selection.random_subset import random_subset


@given(data=st.data(), num_elements=st.one_of(st.integers(1, 200), st.integers(1, 2**33)), seed=st.integers(0, 2**64))
def test_size_order_and_range(data: st.DataObject, num_elements: int, seed: int) -> None:
    near_all = num_elements - 200 if num_elements < 10_000 else 0
    num_active = data.draw(
        st.integers(max(near_all, 0), min(num_elements, near_all + 200))
        if near_all > 0
        else st.integers(0, min(num_elements, 200))
    )
    subset = random_subset(num_elements, num_active, seed=seed, name="w")
    assert subset.dtype == torch.int64 and subset.shape == (num_active,)
    assert bool((subset[1:] > subset[:-1]).all())
    assert num_active == 0 or (int(subset[0]) >= 0 and int(subset[-1]) < num_elements)


GOLDEN = [
    (1000, 8, 0, "model.layers.0.self_attn.q_proj", [215, 226, 234, 351, 374, 614, 647, 853]),
    (20, 13, 3, "complement", [1, 3, 4, 6, 7, 8, 9, 11, 12, 13, 14, 16, 18]),
    (2**33, 5, 7, "huge", [226811419, 1566096580, 1910843425, 3416946419, 6757140863]),
]


@pytest.mark.parametrize(("num_elements", "num_active", "seed", "name", "expected"), GOLDEN)
def test_golden_subsets(num_elements: int, num_active: int, seed: int, name: str, expected: list[int]) -> None:
    assert random_subset(num_elements, num_active, seed=seed, name=name).tolist() == expected


def test_golden_hash_of_a_large_subset() -> None:
    subset = random_subset(4096 * 4096, 100_000, seed=1, name="w")
    digest = hashlib.sha256(subset.numpy().astype("<i8").tobytes()).hexdigest()
    assert digest == "813adbd40e65788a8c83617e9baedb827257a61f20f589f9a8853f81ee0b8d2a"


def test_neither_global_seeds_nor_earlier_calls_matter() -> None:
    torch.manual_seed(1)
    first = random_subset(1000, 50, seed=5, name="a")
    torch.manual_seed(2)
    random_subset(1000, 50, seed=6, name="a")
    assert torch.equal(first, random_subset(1000, 50, seed=5, name="a"))


def test_seed_and_name_give_independent_subsets() -> None:
    subsets = [random_subset(10_000, 1000, seed=s, name=n) for s, n in itertools.product((0, 1), ("a", "b"))]
    subsets.append(random_subset(10_000, 1000, seed=11, name="a"))  # "1" + "1a" is not "11" + "a"
    for one, other in itertools.combinations(subsets, 2):
        shared = int(torch.isin(one, other).sum())
        assert 60 <= shared <= 140, "two independent tenths share a tenth: 100 +- 4 standard deviations of 9"


@pytest.mark.parametrize(("num_elements", "num_active"), [(6, 2), (6, 3), (6, 4), (5, 4)])
def test_all_subsets_are_equally_likely(num_elements: int, num_active: int) -> None:
    rounds = 3000
    counts = Counter(tuple(random_subset(num_elements, num_active, seed=s, name="w").tolist()) for s in range(rounds))
    subsets = list(itertools.combinations(range(num_elements), num_active))
    expected = rounds / len(subsets)
    chi_square = sum((counts[subset] - expected) ** 2 / expected for subset in subsets)
    degrees = len(subsets) - 1
    # Mean `degrees`, variance 2 * degrees; the seeds are fixed, so this either always or never passes.
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5
    assert set(counts) == set(subsets)


@pytest.mark.parametrize("density", [0.025, 0.5, 0.75])
def test_positions_are_uniform(density: float) -> None:
    num_elements = 1 << 18
    subset = random_subset(num_elements, int(density * num_elements), seed=0, name="w")
    per_bin = torch.bincount(subset // (num_elements // 64), minlength=64).double()
    expected = subset.numel() / 64
    chi_square = float(((per_bin - expected) ** 2).sum() / expected / (1 - density))
    assert 63 - 4 * 126**0.5 < chi_square < 63 + 4 * 126**0.5


def test_memory_follows_the_subset_not_the_tensor() -> None:
    random_subset(10, 5, seed=0, name="warm-up")
    tracemalloc.start()
    begin = time.perf_counter()
    random_subset(2**33, 100_000, seed=0, name="w")
    seconds = time.perf_counter() - begin
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 60 * 100_000
    assert seconds < 5, "about 0.02 s are needed"


def test_more_than_all_is_refused() -> None:
    with pytest.raises(AssertionError, match="11 of 10"):
        random_subset(10, 11, seed=0, name="w")
