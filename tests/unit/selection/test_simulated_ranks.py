"""The largest entries of a tensor, chosen by up to 256 ranks that are played one after the other in this process.

Every rank has its own `LargestKeys` and `RadixSearch` and sees nothing but its pieces and the summed histograms.
Expected is what one stable sort of the whole tensor gives, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_ds.selection.largest_keys import (
    LargestKeys,
    RadixSearch,
    first_places,
    index_of,
    kth_largest_score,
    score_keys,
)

FP32_MAX = torch.finfo(torch.float32).max


@dataclass
class Rank:
    """What one rank holds: the tiles' pieces that it owns, and its part of the searches."""

    pieces: list[tuple[int, int]]
    largest: LargestKeys
    search: RadixSearch


def cut(num_elements: int, tile_elements: int, num_ranks: int) -> list[list[tuple[int, int]]]:
    """[ranks][tiles] (begin, end): equal parts of every tile as in a reduce-scatter, the last ones short or empty."""
    pieces: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    for begin in range(0, num_elements, tile_elements):
        end = min(begin + tile_elements, num_elements)
        part = -(-(end - begin) // num_ranks)
        for rank in range(num_ranks):
            pieces[rank].append((min(begin + rank * part, end), min(begin + (rank + 1) * part, end)))
    return pieces


def choose(scores: Tensor, k: int, pieces_of_rank: list[list[tuple[int, int]]], order: list[int]) -> list[Tensor]:
    """Per rank its chosen keys, ascending by index; the ranks take turns in `order`."""
    ranks = [Rank(pieces, LargestKeys(k, "cpu"), RadixSearch(k)) for pieces in pieces_of_rank]
    for number in order:
        for begin, end in ranks[number].pieces:
            ranks[number].largest.add(scores[begin:end].clone(), begin)
    while not ranks[0].search.done:
        total = sum((ranks[number].search.histogram(ranks[number].largest.keys) for number in order), torch.tensor(0))
        for rank in ranks:
            rank.search.take(total)
    assert len({rank.search.kth_key for rank in ranks}) == 1
    return [rank.largest.keys[rank.largest.keys <= rank.search.kth_key] for rank in ranks]


def put_in_order(chosen_of_rank: list[Tensor], pieces_of_rank: list[list[tuple[int, int]]], k: int) -> Tensor:
    """[k] indices, each rank writing its own to where `first_places` says."""
    parts = [
        [index_of(keys)[(index_of(keys) >= begin) & (index_of(keys) < end)] for begin, end in pieces]
        for keys, pieces in zip(chosen_of_rank, pieces_of_rank, strict=True)
    ]
    places = first_places(torch.tensor([[part.numel() for part in row] for row in parts]))
    indices = torch.full((k,), -1)
    for row, places_row in zip(parts, places.tolist(), strict=True):
        for part, place in zip(row, places_row, strict=True):
            indices[place : place + part.numel()] = part
    return indices


def sort_oracle(scores: Tensor, k: int) -> Tensor:
    """[k] indices of the largest |scores|, ties by ascending index; ascending."""
    return scores.abs().double().sort(descending=True, stable=True).indices[:k].sort().values


@settings(max_examples=200)
@given(
    data=st.data(),
    entries=st.sampled_from(
        [
            st.sampled_from([0.0, -0.0, 1.0, -1.0]),
            st.floats(width=32, allow_nan=False, allow_infinity=False),
        ]
    ),
    num_ranks=st.integers(1, 9),
    tile_elements=st.integers(1, 50),
)
def test_neither_ranks_nor_tiles_nor_their_order_matter(
    data: st.DataObject, entries: st.SearchStrategy[float], num_ranks: int, tile_elements: int
) -> None:
    scores = torch.tensor(data.draw(st.lists(entries, min_size=1, max_size=80)), dtype=torch.float32)
    k = data.draw(st.integers(1, scores.numel()))
    pieces = cut(scores.numel(), tile_elements, num_ranks)
    chosen = choose(scores, k, pieces, data.draw(st.permutations(range(num_ranks))))
    expected = sort_oracle(scores, k)
    assert put_in_order(chosen, pieces, k).tolist() == expected.tolist()
    # Whoever owns which part: the same set.
    shuffled = data.draw(st.permutations(pieces))
    chosen = torch.cat(choose(scores, k, shuffled, list(range(num_ranks))))
    assert index_of(chosen).sort().values.tolist() == expected.tolist()
    assert chosen.sort().values.tolist() == score_keys(scores[expected], expected).sort().values.tolist()


def random_scores(numel: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(numel))


def many_ties(numel: int) -> Tensor:
    return (random_scores(numel) * 2).round()


def in_one_part(numel: int) -> Tensor:
    """Everything that is large lies in the first of 256 parts, everything else is zero."""
    scores = torch.zeros(numel)
    size = -(-numel // 256)
    scores[:size] = random_scores(size)
    return scores


def denormals(numel: int) -> Tensor:
    """Neighbouring denormals and the smallest normal numbers, both signs; every pattern about twice."""
    patterns = torch.randint(0x007FFF80, 0x00800080, (numel,), generator=torch.Generator().manual_seed(1))
    return patterns.int().view(torch.float32) * torch.where(torch.arange(numel) % 3 == 0, -1, 1)


def extremes(numel: int) -> Tensor:
    return torch.tensor([0.0, -0.0, FP32_MAX, -FP32_MAX, 1e-45, -1e-45]).repeat(-(-numel // 6))[:numel]


def ascending(numel: int) -> Tensor:
    """Every piece is better than all before it, so that nothing can be dropped early."""
    return torch.arange(numel).float()


@pytest.mark.parametrize(
    "make", [random_scores, many_ties, torch.zeros, torch.ones, in_one_part, denormals, extremes, ascending]
)
@pytest.mark.parametrize(
    ("numel", "tile_elements", "k"),
    [
        (256 * 16, 1024, 1000),  # 1000 is no multiple of 256
        (3001, 1000, 257),  # nor is anything else
        (3001, 999, 3001),
        (256 * 4, 256, 1),
        (100, 64, 37),  # fewer elements than ranks
        (1, 64, 1),
    ],
)
def test_256_ranks_choose_what_one_does(make: Callable[[int], Tensor], numel: int, tile_elements: int, k: int) -> None:
    scores = make(numel)
    pieces = cut(numel, tile_elements, 256)
    chosen = choose(scores, k, pieces, list(range(256)))
    alone = choose(scores, k, [[(0, numel)]], [0])
    indices = put_in_order(chosen, pieces, k)
    assert torch.equal(indices, sort_oracle(scores, k))
    assert torch.equal(indices, index_of(alone[0]))


def test_a_rank_that_is_last_in_every_tile_may_have_everything() -> None:
    scores = torch.zeros(256 * 8)
    pieces = cut(scores.numel(), 512, 256)
    for begin, end in pieces[255]:
        scores[begin:end] = 1.0
    chosen = choose(scores, 7, pieces, list(range(256)))
    assert [keys.numel() for keys in chosen] == [0] * 255 + [7]
    assert torch.equal(put_in_order(chosen, pieces, 7), sort_oracle(scores, 7))


@pytest.mark.parametrize("k", [1, 100, 1000, 4095])
def test_scores_with_ties_over_256_ranks(k: int) -> None:
    """`kth_largest_score` with a sum that replays the other ranks' histograms."""
    scores = torch.cat([random_scores(3000).double().abs(), torch.zeros(500).double(), torch.ones(595).double()])
    scores = scores * 1e-200  # beyond fp32
    parts = scores[torch.randperm(scores.numel(), generator=torch.Generator().manual_seed(0))].split(16)
    assert len(parts) == 256

    totals: list[Tensor] = []

    def record(histogram: Tensor) -> Tensor:
        totals.append(histogram)
        return histogram

    expected = float(scores.sort(descending=True).values[k - 1])
    assert kth_largest_score(scores, k, record) == expected
    # Every rank counts only its part; the totals are those of one rank that holds everything.
    recorded = iter(totals)
    assert kth_largest_score(parts[200], k, lambda _: next(recorded)) == expected


def test_searches_of_several_tensors_share_one_sum() -> None:
    tensors = [random_scores(500), many_ties(700), torch.zeros(90)]
    keys = [score_keys(scores, torch.arange(scores.numel())) for scores in tensors]
    searches = [RadixSearch(k) for k in (17, 300, 89)]
    halves = [[part[0::2] for part in keys], [part[1::2] for part in keys]]
    while not searches[0].done:
        stacked = [
            torch.stack([search.histogram(part) for search, part in zip(searches, half, strict=True)])
            for half in halves
        ]
        for search, total in zip(searches, stacked[0] + stacked[1], strict=True):
            search.take(total)
    assert [search.kth_key for search in searches] == [
        int(part.sort().values[k - 1]) for part, k in zip(keys, (17, 300, 89), strict=True)
    ]
