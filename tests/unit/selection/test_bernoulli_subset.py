"""Independent choices: the literal definition, the right frequencies, and the same numbers everywhere."""

from __future__ import annotations

import hashlib
import itertools
import time
import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ds.selection.bernoulli_subset import bernoulli_subset

LARGE = 11008 * 4096  # the largest matrix of Llama 2 7B


def literal_subset(num_elements: int, probability: float, seed: int, name: str) -> list[int]:
    """Element by element, with Python's integers."""

    def stream(label: str) -> np.random.Philox:
        digest = hashlib.sha256(f"sparse_ds bernoulli_subset\0{seed}\0{name}\0{label}".encode()).digest()
        return np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    uppers, lowers = stream("upper 16 bits"), stream("lower 48 bits")
    threshold = int(Fraction(str(probability)) * 2**64)
    chosen = []
    for element in range(num_elements):
        if element % 4 == 0:
            word = int(uppers.random_raw())
        upper = word >> (16 * (element % 4)) & 0xFFFF
        number = upper << 48
        if upper == threshold >> 48:
            number |= int(lowers.random_raw()) >> 16
        if number < threshold:
            chosen.append(element)
    return chosen


@settings(max_examples=30)
@given(
    num_elements=st.integers(1, 3000),
    probability=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.5, 1e-30, 2**-16, 1 - 2**-53])),
    seed=st.integers(0, 2**64),
    chunk_words=st.integers(1, 800),
)
def test_equals_the_definition_whatever_the_chunks(
    num_elements: int, probability: float, seed: int, chunk_words: int
) -> None:
    subset = bernoulli_subset(num_elements, probability, seed=seed, name="w", chunk_words=chunk_words)
    assert subset.dtype == torch.int64
    assert subset.tolist() == literal_subset(num_elements, probability, seed, "w")


def test_undecided_upper_bits_go_through_chunks() -> None:
    """A threshold whose upper 16 bits are 0: only the second stream can choose, in every chunk."""
    subsets = [bernoulli_subset(2**21, 2**-17, seed=3, name="w", chunk_words=2**n) for n in (5, 12, 19)]
    assert subsets[0].tolist() == literal_subset(2**21, 2**-17, 3, "w")
    assert torch.equal(subsets[0], subsets[1]) and torch.equal(subsets[0], subsets[2])


def test_edges() -> None:
    assert bernoulli_subset(10, 1.0, seed=0, name="w").tolist() == list(range(10))
    assert bernoulli_subset(10, 1, seed=0, name="w").tolist() == list(range(10))
    assert bernoulli_subset(10_000, 0.0, seed=0, name="w").tolist() == []
    assert bernoulli_subset(2**20, 1e-19, seed=0, name="w").tolist() == []
    for probability in (-0.1, 1.1):
        with pytest.raises(AssertionError, match="probability"):
            bernoulli_subset(10, probability, seed=0, name="w")


def test_golden_subset() -> None:
    expected = [2, 4, 17, 21, 24, 26, 27, 39]
    assert bernoulli_subset(40, 0.2, seed=0, name="model.layers.0.self_attn.q_proj").tolist() == expected


def test_golden_hash_of_a_large_subset() -> None:
    subset = bernoulli_subset(4096 * 4096, 0.01, seed=1, name="w")
    digest = hashlib.sha256(subset.numpy().astype("<i8").tobytes()).hexdigest()
    assert digest == "205b4595f6b28554954489a709ce9c3e2283510c0b3fd8e407fc2310519b984c"


def test_neither_global_seeds_nor_earlier_calls_matter() -> None:
    torch.manual_seed(1)
    first = bernoulli_subset(1000, 0.1, seed=5, name="a")
    torch.manual_seed(2)
    bernoulli_subset(1000, 0.1, seed=6, name="a")
    assert torch.equal(first, bernoulli_subset(1000, 0.1, seed=5, name="a"))


def test_seed_and_name_give_independent_subsets() -> None:
    subsets = [bernoulli_subset(10_000, 0.1, seed=s, name=n) for s, n in itertools.product((0, 1), ("a", "b"))]
    subsets.append(bernoulli_subset(10_000, 0.1, seed=11, name="a"))  # "1" + "1a" is not "11" + "a"
    for one, other in itertools.combinations(subsets, 2):
        shared = int(torch.isin(one, other).sum())
        assert 60 <= shared <= 140, "two independent tenths share a hundredth: 100 +- 4 standard deviations of 10"


@pytest.mark.parametrize("probability", [0.25, 0.3, 0.9])
def test_every_subset_has_its_probability(probability: float) -> None:
    rounds, num_elements = 4000, 4
    counts = Counter(
        tuple(bernoulli_subset(num_elements, probability, seed=s, name="w").tolist()) for s in range(rounds)
    )
    chi_square = 0.0
    for size in range(num_elements + 1):
        for subset in itertools.combinations(range(num_elements), size):
            expected = rounds * probability**size * (1 - probability) ** (num_elements - size)
            chi_square += (counts[subset] - expected) ** 2 / expected
    degrees = 2**num_elements - 1
    # Mean `degrees`, variance about 2 * degrees; the seeds are fixed, so this either always or never passes.
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("probability", [0.01, 0.0001, 2**-16, 3 * 2**-18, 0.5])
def test_number_and_places_of_the_chosen(probability: float) -> None:
    num_elements = 2**23
    subset = bernoulli_subset(num_elements, probability, seed=2, name="w")
    assert bool((subset[1:] > subset[:-1]).all()) and int(subset[0]) >= 0 and int(subset[-1]) < num_elements
    assert abs(subset.numel() - num_elements * probability) < 4 * (num_elements * probability) ** 0.5
    for num_cells, cells in [(4, subset % 4), (8, subset // (num_elements // 8))]:
        counts = torch.bincount(cells, minlength=num_cells).double()
        expected = num_elements * probability / num_cells
        assert bool(((counts - expected).abs() < 4.5 * expected**0.5).all())
    expected_pairs = num_elements * probability**2
    num_neighbours = int((subset.diff() == 1).sum())
    assert abs(num_neighbours - expected_pairs) < 4 * expected_pairs**0.5 + 2


def test_large_matrix_in_bounded_memory_and_time() -> None:
    tracemalloc.start()
    begin = time.perf_counter()
    subset = bernoulli_subset(LARGE, 0.01, seed=0, name="w")
    seconds = time.perf_counter() - begin
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 16 * subset.numel() + 80 * 2**18
    assert seconds < 10, "about 0.1 s are needed"
