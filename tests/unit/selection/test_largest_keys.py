"""Keys, the radix search and the running top-k of one rank, against sorts in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_ds.selection.largest_keys import (
    SAMPLE_STRIDE,
    LargestKeys,
    RadixSearch,
    first_places,
    index_of,
    kth_largest_score,
    kth_smallest_key,
    magnitude_of,
    score_keys,
)

# 1e-45 is the smallest denormal, 3.4028234663852886e38 the largest number.
TYING = st.sampled_from(torch.tensor([0, -0.0, 1, -1, 2, 1e-45, -1e-45, 1e-39, 3.4028234663852886e38]).tolist())
ANY = st.one_of(TYING, st.floats(width=32, allow_nan=False, allow_infinity=False))
NOT_FINITE = [math.inf, -math.inf, math.nan, -math.nan]


def alone(histogram: Tensor) -> Tensor:
    return histogram


@given(
    scores=st.lists(ANY, max_size=40),
    first=st.sampled_from([0, 1, 2**31 - 20, 2**32 - 40]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_keys_sort_like_score_and_index_and_can_be_read_back(
    scores: list[float], first: int, dtype: torch.dtype
) -> None:
    first = first if dtype == torch.int64 else min(first, 1000)
    indices = torch.arange(first, first + len(scores), dtype=dtype).flip(0)
    keys = score_keys(torch.tensor(scores), indices)
    assert keys.dtype == torch.int64 and bool((keys >= 0).all())
    by_rank = sorted(range(len(scores)), key=lambda p: (-abs(scores[p]), indices[p]))
    assert keys.argsort().tolist() == by_rank
    assert keys.unique().numel() == len(scores)
    assert index_of(keys).tolist() == indices.tolist()
    assert magnitude_of(keys).dtype == torch.float32
    assert magnitude_of(keys).tolist() == [abs(score) for score in scores]


def test_keys_of_the_extremes() -> None:
    keys = score_keys(torch.tensor([3.4028234663852886e38, 0.0]), torch.tensor([0, 2**32 - 1]))
    assert keys.tolist() == [0x00800000_00000000, 2**63 - 1]


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    scores = torch.tensor([1.0, bad, 0.0])
    with pytest.raises(RuntimeError, match="1 of 3 scores are not finite: the training has diverged"):
        score_keys(scores, torch.arange(3))
    for k in (0, 2):
        with pytest.raises(RuntimeError, match="diverged"):
            LargestKeys(k, "cpu").add(scores, 0)
    if bad > 0 or bad != bad:
        with pytest.raises(RuntimeError, match="1 of 3 scores are not finite"):
            kth_largest_score(scores.double(), 1, alone)


@pytest.mark.parametrize("index", [-1, 2**32])
def test_indices_beyond_32_bits_are_refused(index: int) -> None:
    with pytest.raises(AssertionError, match="outside of"):
        score_keys(torch.ones(2), torch.tensor([0, index]))


@given(data=st.data(), num_bits=st.integers(1, 63))
def test_radix_search_equals_the_sort(data: st.DataObject, num_bits: int) -> None:
    below = st.integers(0, 2**num_bits - 1)
    keys = data.draw(st.lists(st.one_of(below, st.sampled_from([0, 2**num_bits - 1])), min_size=1, max_size=30))
    k = data.draw(st.integers(1, len(keys)))
    expected = sorted(keys)[k - 1]
    assert kth_smallest_key(torch.tensor(keys), k, alone, num_bits) == expected
    if num_bits <= 31:
        assert kth_smallest_key(torch.tensor(keys, dtype=torch.int32), k, alone, num_bits) == expected


def test_rounds_and_what_they_count() -> None:
    search = RadixSearch(1)
    num_counted = []
    while not search.done:
        histogram = search.histogram(torch.tensor([12345, 12345 + 2**8, 2**62]))
        assert histogram.dtype == torch.int64 and histogram.shape == (2048,)
        num_counted.append(int(histogram.sum()))
        search.take(histogram)
    assert search.kth_key == 12345
    # 5 digits of 11 bits and one of 8; keys that begin differently are not counted.
    assert num_counted == [3, 2, 2, 2, 2, 1]


@pytest.mark.parametrize("num_keys", [0, 3])
def test_more_than_there_are_is_refused(num_keys: int) -> None:
    with pytest.raises(AssertionError, match=f"4-th smallest of {num_keys} keys does not exist"):
        kth_smallest_key(torch.arange(num_keys), 4, alone)


def test_the_result_before_the_end_is_refused() -> None:
    with pytest.raises(AssertionError, match="63 bits are still unknown"):
        _ = RadixSearch(1).kth_key


@given(
    data=st.data(),
    scores=st.lists(
        st.one_of(st.sampled_from([0.0, -0.0, 5e-324, 1.0, 1.7e308]), st.floats(0, allow_infinity=False)), min_size=1
    ),
)
def test_kth_largest_score_equals_the_sort(data: st.DataObject, scores: list[float]) -> None:
    k = data.draw(st.integers(1, len(scores)))
    kth = kth_largest_score(torch.tensor(scores, dtype=torch.float64), k, alone)
    assert kth == sorted(scores, reverse=True)[k - 1]


def test_negative_scores_are_refused() -> None:
    with pytest.raises(AssertionError, match="negative"):
        kth_largest_score(torch.tensor([1.0, -1.0], dtype=torch.float64), 1, alone)


@settings(max_examples=300)
@given(data=st.data(), scores=st.lists(ANY, max_size=60), offset=st.sampled_from([0, 7, 2**32 - 60]))
def test_the_largest_of_pieces_in_any_order(data: st.DataObject, scores: list[float], offset: int) -> None:
    k = data.draw(st.integers(0, len(scores) + 2))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(scores)), max_size=5)))
    pieces = list(zip([0, *cuts], [*cuts, len(scores)], strict=True))
    if data.draw(st.booleans()):
        pieces = data.draw(st.permutations(pieces))
    largest = LargestKeys(k, "cpu")
    dense = torch.tensor(scores, dtype=torch.float32)
    for begin, end in pieces:
        largest.add(dense[begin:end], offset + begin)
        assert largest.keys.numel() == largest.scores.numel() <= k
    by_rank = sorted(range(len(scores)), key=lambda i: (-abs(scores[i]), i))
    expected = sorted(by_rank[:k])
    assert index_of(largest.keys).tolist() == [offset + i for i in expected]
    assert largest.scores.tolist() == [scores[i] for i in expected]
    assert torch.equal(largest.keys, score_keys(largest.scores, index_of(largest.keys)))


@pytest.mark.parametrize("k", [1, 7, 300, 4000, 29_000, 40_000])
@pytest.mark.parametrize("kind", ["normal", "tying", "all the same", "largest in the sample", "smallest in the sample"])
def test_pieces_so_large_that_a_sample_narrows_the_search(kind: str, k: int) -> None:
    """Also where the sample says nothing of the rest: then all of it is searched."""
    generator = torch.Generator().manual_seed(k)
    scores = torch.randn(30_000, generator=generator)
    if kind == "tying":
        scores = torch.randint(-5, 6, (30_000,), generator=generator).float()
    elif kind == "all the same":
        scores.fill_(-2.0)
    elif kind == "largest in the sample":
        scores[::SAMPLE_STRIDE] *= 1e6
    elif kind == "smallest in the sample":
        scores[::SAMPLE_STRIDE] *= 1e-6
    largest = LargestKeys(k, "cpu")
    for begin in (0, 10_000, 20_000):
        largest.add(scores[begin : begin + 10_000], begin)
    magnitudes = scores.abs().tolist()
    expected = sorted(sorted(range(30_000), key=lambda p: (-magnitudes[p], p))[:k])
    assert index_of(largest.keys).tolist() == expected
    assert torch.equal(largest.scores, scores[expected])


def test_strided_pieces_and_gradients_are_read_as_they_are() -> None:
    dense = torch.arange(12.0, requires_grad=True)
    largest = LargestKeys(2, "cpu")
    largest.add(dense[::3], 100)
    assert index_of(largest.keys).tolist() == [102, 103]
    assert largest.scores.tolist() == [6.0, 9.0] and not largest.scores.requires_grad


def test_positions_beyond_32_bits_are_refused() -> None:
    with pytest.raises(AssertionError, match="above 2\\^32"):
        LargestKeys(2, "cpu").add(torch.ones(2), 2**32 - 1)


def test_first_places() -> None:
    counts_RP = torch.tensor([[2, 0, 1], [0, 3, 4]])
    assert first_places(counts_RP).tolist() == [[0, 2, 5], [2, 2, 6]]
    assert first_places(torch.zeros(3, 0, dtype=torch.int64)).shape == (3, 0)
