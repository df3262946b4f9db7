"""The K largest entries of a dense tensor that is spread over ranks and that no rank ever holds.

The tensor passes in tiles. Each rank gets a part of every reduced tile, a *piece*, looks at it once and keeps the k
largest entries seen so far. Then the k-th largest of what all ranks kept is found by a radix search, and every rank
knows which of its entries are among them.

An entry is one int64 *key*, so that order, ties and position are one comparison of integers::

    bit   63  62 ........................... 32  31 ............ 0
          0   0x7FFFFFFF - fp32 bits of |score|   index (< 2^32)

fp32 numbers >= 0 are ordered like their bit patterns (denormals and zero too), so ascending keys are descending
|scores|, ties by ascending index. An index occurs once, hence so does a key: exactly k keys are <= the k-th smallest
one, whatever the number of ranks, of tiles, and their order. The upper half alone is called the *distance* of a score.

Radix search: 11 bits a round from the most significant ones. In each round every rank counts, among its keys that begin
with the digits found so far, how often each next digit occurs; the counts are summed over ranks, and the running total
says which digit the k-th smallest key has. 63 bits are 6 rounds of 16 KiB each, however many keys there are.

Nothing here communicates. `RadixSearch` is the search cut open between counting and deciding; the caller sums::

    search = RadixSearch(k)
    while not search.done:
        search.take(all_reduce(search.histogram(keys)))
    search.kth_key
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

INDEX_BITS = 32
SCORE_BITS = 31  # fp32 without its sign
DIGIT_BITS = 11  # 2048 counts: 16 KiB a round, and they fit into the shared memory of a GPU's multiprocessor

SAMPLE_STRIDE, SAMPLE_MARGIN = 61, 16
"""Of the sample that narrows a search; a prime, so that it does not fall into one column of a matrix."""

_MAX_DISTANCE = (1 << SCORE_BITS) - 1
_NUM_NON_FINITE = 1 << 23  # fp32 patterns from infinity up have the 2^23 smallest distances
_MAX_FP64_BITS = (1 << 63) - 1


def score_keys(scores: Tensor, indices: Tensor) -> Tensor:
    """Encode entries as keys: ascending keys are descending |scores|, ties by ascending index.

    Args:
        scores: [n] fp32, any sign.
        indices: [n] int32 or int64, 0 <= index < 2^32.

    Returns:
        [n] int64 >= 0, unique if the indices are.

    Raises:
        RuntimeError: a score is not finite.
    """
    if indices.numel():
        low, high = (int(end) for end in indices.aminmax())
        assert low >= 0 and high >> INDEX_BITS == 0, f"indices {low} .. {high} are outside of 0 .. 2^{INDEX_BITS} - 1"
    return (_distances(scores).long() << INDEX_BITS) | indices


def index_of(keys: Tensor) -> Tensor:
    """Index in each key, int64."""
    return keys & ((1 << INDEX_BITS) - 1)


def magnitude_of(keys: Tensor) -> Tensor:
    """|score| in each key, fp32."""
    return (_MAX_DISTANCE - (keys >> INDEX_BITS)).int().view(torch.float32)


def _distances(scores: Tensor) -> Tensor:
    """int32 0x7FFFFFFF - bits of |score|, integer operations only (so that denormals survive whatever the CPU flags).

    Raises:
        RuntimeError: a score is not finite.
    """
    assert scores.dtype == torch.float32 and scores.dim() == 1, f"scores: {scores.dtype} {tuple(scores.shape)}"
    # x ^ 0x7FFFFFFF is 0x7FFFFFFF - x, for 31-bit x.
    distances = (scores.detach().view(torch.int32) & _MAX_DISTANCE).bitwise_xor_(_MAX_DISTANCE)
    if distances.numel() and int(distances.min()) < _NUM_NON_FINITE:
        num_bad = int((distances < _NUM_NON_FINITE).sum())
        raise RuntimeError(f"{num_bad} of {scores.numel()} scores are not finite: the training has diverged")
    return distances


class RadixSearch:
    """The k-th smallest of integers >= 0 that are spread over ranks, one digit a round, most significant first.

    Each rank has its own object, and all take the same totals. Searches for several tensors may go in lockstep, so that
    one sum of their stacked histograms serves all.

    Args:
        k: 1 <= k <= number of keys over all ranks (checked by the first `take`).
        num_bits: keys are below 2^num_bits.
    """

    def __init__(self, k: int, num_bits: int = 63) -> None:
        assert k >= 1 and 1 <= num_bits <= 63, f"k = {k}, num_bits = {num_bits}"
        self._rest = k  # the key sought is the `_rest`-th smallest of those that begin with `_prefix`
        self._prefix = 0
        self._shift = num_bits

    @property
    def done(self) -> bool:
        return self._shift == 0

    @property
    def kth_key(self) -> int:
        assert self.done, f"{self._shift} bits are still unknown"
        return self._prefix

    def histogram(self, keys: Tensor) -> Tensor:
        """Count the next digit of those local keys that begin with the digits found so far.

        Memory: one tensor like `keys`.

        Args:
            keys: [n] int32 or int64, n may be 0; the same ones in every round.

        Returns:
            [2048] int64 on the device of `keys`.
        """
        width = self._next_width()
        digits = (keys >> (self._shift - width)).sub_(self._prefix << width)
        # Keys with another beginning fall below or above the digits: into one bin at each end.
        digits.clamp_(-1, 1 << width).add_(1)
        counts = torch.bincount(digits, minlength=(1 << DIGIT_BITS) + 2)[1:-1]
        counts[1 << width :] = 0
        return counts

    def take(self, total: Tensor) -> None:
        """Fix the next digit.

        Args:
            total: [2048] int64, the sum of all ranks' histograms.
        """
        width = self._next_width()
        running = total.cpu().cumsum(0)
        num_keys = int(running[-1])
        assert self._rest <= num_keys, f"the {self._rest}-th smallest of {num_keys} keys does not exist"
        digit = int(torch.searchsorted(running, self._rest))
        self._rest -= int(running[digit - 1]) if digit else 0
        self._prefix = (self._prefix << width) | digit
        self._shift -= width

    def _next_width(self) -> int:
        assert not self.done, "all digits are known"
        return min(DIGIT_BITS, self._shift)


def kth_smallest_key(local_keys: Tensor, k: int, sum_over_ranks: Callable[[Tensor], Tensor], num_bits: int = 63) -> int:
    """Find the k-th smallest key over all ranks. Keys of `score_keys` are unique: exactly k of them are <= the result.

    Memory: 8 bytes per key.

    Args:
        local_keys: [n] int64 (or int32) >= 0, n may be 0.
        k: 1 <= k <= number of keys over all ranks.
        sum_over_ranks: gets a [2048] int64 histogram and returns the sum over ranks; the identity for one rank. Called
            6 times (ceil(num_bits / 11)), the same on every rank.
        num_bits: keys are below 2^num_bits.
    """
    search = RadixSearch(k, num_bits)
    while not search.done:
        search.take(sum_over_ranks(search.histogram(local_keys)))
    return search.kth_key


def kth_smallest_keys(
    local_keys: Sequence[Tensor], ks: Sequence[int], sum_over_ranks: Callable[[Tensor], Tensor]
) -> list[int]:
    """`kth_smallest_key` of several tensors at once: as many rounds as for one of them.

    Memory: 8 bytes per key of one tensor, 16 KiB per tensor.

    Args:
        local_keys: at least one tensor [n] int64 as for `kth_smallest_key`.
        ks: k of each.
        sum_over_ranks: gets [tensors, 2048] int64 histograms and returns the sum over ranks; called 6 times.
    """
    searches = [RadixSearch(k) for k in ks]
    while not searches[0].done:
        histograms = [search.histogram(keys) for search, keys in zip(searches, local_keys, strict=True)]
        for search, total in zip(searches, sum_over_ranks(torch.stack(histograms)).cpu(), strict=True):
            search.take(total)
    return [search.kth_key for search in searches]


def kth_largest_score(local_scores: Tensor, k: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> float:
    """Find the k-th largest fp64 score over all ranks: at least k scores are >= the result, fewer than k are above.

    Memory: 16 bytes per score.

    Args:
        local_scores: [n] fp64, >= 0, n may be 0; not necessarily unique.
        k: 1 <= k <= number of scores over all ranks.
        sum_over_ranks: as in `kth_smallest_key`.

    Raises:
        RuntimeError: a score is not finite. Before the first sum, and on this rank only: where ranks may differ, agree
            on the check first.
    """
    assert local_scores.dtype == torch.float64, f"scores: {local_scores.dtype}"
    num_bad = local_scores.numel() - int(local_scores.isfinite().sum())
    if num_bad:
        raise RuntimeError(f"{num_bad} of {local_scores.numel()} scores are not finite: the training has diverged")
    assert bool((local_scores >= 0).all()), "scores are negative"
    # As with fp32: ordered like the bit patterns. The mask takes the sign off -0.0.
    mirrored = (local_scores.detach().view(torch.int64) & _MAX_FP64_BITS).bitwise_xor_(_MAX_FP64_BITS)
    bits = _MAX_FP64_BITS - kth_smallest_key(mirrored, k, sum_over_ranks)
    return float(torch.tensor(bits, dtype=torch.int64).view(torch.float64))


def _alone(histogram: Tensor) -> Tensor:
    """The sum over ranks of a search within one rank."""
    return histogram


class LargestKeys:
    """The k largest |scores| among the pieces that this rank has seen.

    An entry may be a block of weights, whose score is a sum over it: then `details` holds a number of each.

    Memory: 12 bytes per kept entry, and 4 per detail, at most k of them. While a piece is added, at most 14 bytes per
    entry of the piece (its own 4 not counted) and 80 bytes per kept entry come on top. Time: O(piece + k); once k
    entries are kept, what is below the smallest of them is dropped in one comparison.

    Args:
        k: how many to keep, >= 0.
        device: of the pieces.

    Attributes:
        keys: [<= k] int64 keys of the kept entries, ascending by index (not by key).
        scores: [<= k] fp32 their scores, with sign.
        details: [<= k, e] fp32, what was added with them; None if nothing was.
    """

    def __init__(self, k: int, device: torch.device | str) -> None:
        assert k >= 0, f"k = {k}"
        self.k = k
        self.keys = torch.empty(0, dtype=torch.int64, device=device)
        self.scores = torch.empty(0, dtype=torch.float32, device=device)
        self.details: Tensor | None = None
        self._bound = 1 << 63  # keys from here on are of no interest
        self._end = 0

    def add(self, scores: Tensor, first_index: int, details: Tensor | None = None) -> None:
        """Look at the entries first_index, first_index + 1, ... of the tensor.

        Args:
            scores: [n] fp32, the reduced piece; it is not kept.
            first_index: flat position of its first entry. Pieces must not overlap; ascending order saves a sort.
            details: [n, e] fp32, with every piece or with none.

        Raises:
            RuntimeError: a score is not finite. On this rank only: agree over ranks before all of them raise.
        """
        end = first_index + scores.numel()
        assert first_index >= 0 and end <= 1 << INDEX_BITS, f"positions {first_index} .. {end}: above 2^{INDEX_BITS}"
        distances = _distances(scores)
        if self.k == 0:
            return
        # The smallest key that an entry at this distance can have is distance << 32 | first_index.
        limit = (self._bound - 1 - first_index) >> INDEX_BITS
        positions = _smallest_positions(distances, self.k, limit)
        keys = (distances[positions].long() << INDEX_BITS) | (positions + first_index)
        self.keys = torch.cat([self.keys, keys])
        self.scores = torch.cat([self.scores, scores.detach()[positions]])
        if details is not None:
            before = details[:0] if self.details is None else self.details
            self.details = torch.cat([before, details.detach()[positions]])
        if first_index < self._end:
            self._keep(index_of(self.keys).argsort())
        self._end = max(self._end, end)
        if self.keys.numel() > self.k:
            kth = kth_smallest_key(self.keys, self.k, _alone)
            self._keep(self.keys <= kth)
            self._bound = kth

    def _keep(self, chosen: Tensor) -> None:
        self.keys, self.scores = self.keys[chosen], self.scores[chosen]
        self.details = None if self.details is None else self.details[chosen]


def _smallest_positions(distances: Tensor, k: int, limit: int) -> Tensor:
    """Positions of the k smallest distances (or fewer) that are <= limit, ties by ascending position; ascending."""
    guess = min(limit, _probable_bound(distances, k))
    chosen = distances <= guess
    num_chosen = int(chosen.count_nonzero())
    if num_chosen < k and guess < limit:
        chosen = distances <= limit
        num_chosen = int(chosen.count_nonzero())
    if num_chosen > k:
        near = distances[chosen] if num_chosen < distances.numel() // 4 else distances
        kth = kth_smallest_key(near, k, _alone, num_bits=SCORE_BITS)
        torch.lt(distances, kth, out=chosen)
        tied = (distances == kth).nonzero().view(-1)
        chosen[tied[: k - int(chosen.count_nonzero())]] = True
    return chosen.nonzero().view(-1)


def _probable_bound(distances: Tensor, k: int) -> int:
    """A distance within which k entries nearly always are, and not many more; the caller counts them.

    Of every SAMPLE_STRIDE-th entry the one at twice the share of k, and some more: the search for the k-th smallest
    then goes through some 2k entries instead of all.
    """
    sample = distances[::SAMPLE_STRIDE]
    place = 2 * k // SAMPLE_STRIDE + SAMPLE_MARGIN
    if place >= sample.numel():
        return _MAX_DISTANCE
    return int(sample.kthvalue(place).values)


def first_places(counts_RP: Tensor) -> Tensor:
    """Where the chosen entries of each rank and tile go in the ascending list of all chosen indices.

    Tiles are ascending ranges of the tensor, and within a tile the ranks own consecutive parts in the order of their
    numbers, so the list runs through tile 0 of rank 0, tile 0 of rank 1, ..., tile 1 of rank 0, ...

    Args:
        counts_RP: [ranks, tiles] int64, number of chosen entries.

    Returns:
        [ranks, tiles] int64, number of chosen entries before the first one of (rank, tile).
    """
    counts_PR = counts_RP.t()
    flat = counts_PR.flatten()
    return (flat.cumsum(0) - flat).view_as(counts_PR).t()
