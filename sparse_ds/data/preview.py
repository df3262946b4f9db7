"""What a run will learn from, in numbers and in a few samples token by token: the facts of `sparse-ds data preview`.

Everything is counted on the tokenized samples that training takes, after templates, cutting and masking; nothing is
guessed from the files. `token_doctor` judges the facts, `preview_text` and `preview_html` show them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from sparse_ds.data.tokenization import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_STREAMED = 1000
"""Of a stream so many samples are looked at: it has no length, and its end may be far."""
NUM_BINS = 12
_ROWS_AT_ONCE = 1000
_Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TokenView:
    """One token of a sample.

    Attributes:
        token_id: its number.
        text: what it adds to the text; empty where a character goes on in the next token.
        is_trained: the loss counts it.
        is_special: BOS, EOS and the like, not text.
    """

    token_id: int
    text: str
    is_trained: bool
    is_special: bool


@dataclass(frozen=True, slots=True)
class SampleView:
    """One sample; `number` counts from 0, `label` is that of a classification."""

    number: int
    tokens: list[TokenView]
    label: str | None = None


@dataclass
class SourceFacts:
    """One source, counted. A number of samples where nothing else is said.

    Attributes:
        name: `data.train` or `data.eval`.
        source: as the run names it.
        format_name: its format.
        labels: of a classification, else None; `label_counts` are samples by the position of their label.
        is_part: only the first samples of a stream were looked at.
        num_truncated, num_dropped: as the tokenizer of the data counted them; None: not known.
        lengths: tokens of each sample.
        num_trained_tokens: tokens that the loss counts.
        num_duplicates: samples that are equal to an earlier one.
        digests: of each sample's tokens, to find it in another source.
        num_bos_first, num_bos_twice: samples that begin with the BOS token, and with two.
        num_end_trained: samples whose last token (but for blanks) is special and trained: there the model learns to
            stop.
        num_end_masked: samples whose last token is special and not trained.
        num_cut: samples as long as `data.sequence_length` that do not end with a special token.
        num_eos_inside: samples with a trained EOS token before their last token.
        num_pad_inside: samples with the pad token where it is not the EOS token.
        num_unknown_tokens: unknown tokens in all.
        largest_id: of any token.
    """

    name: str
    source: str
    format_name: str
    labels: tuple[str, ...] | None
    is_part: bool
    num_truncated: int | None
    num_dropped: int | None
    lengths: _Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    num_trained_tokens: int = 0
    num_duplicates: int = 0
    digests: set[bytes] = field(default_factory=set)
    num_bos_first: int = 0
    num_bos_twice: int = 0
    num_end_trained: int = 0
    num_end_masked: int = 0
    num_cut: int = 0
    num_eos_inside: int = 0
    num_pad_inside: int = 0
    num_unknown_tokens: int = 0
    largest_id: int = 0
    label_counts: Counter[int] = field(default_factory=Counter)
    samples: list[SampleView] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def trained_fraction(self) -> float:
        """Trained tokens / all tokens."""
        return self.num_trained_tokens / self.num_tokens


def look_at(
    data: Any, tokenizer: PreTrainedTokenizerBase, name: str, sequence_length: int, num_shown: int
) -> SourceFacts:
    """Count one source and pick samples to show.

    Args:
        data: `TokenizedData` of the source; its dataset may be a stream.
        tokenizer: the model's.
        name: `data.train` or `data.eval`.
        sequence_length: tokens of the longest sample.
        num_shown: how many samples to show, spread evenly over the source.
    """
    dataset, labels = data.dataset, getattr(data, "labels", None)
    is_stream = not isinstance(dataset, Dataset)
    facts = SourceFacts(
        name,
        str(data.source),
        data.format_name,
        labels,
        is_stream,
        getattr(data, "num_truncated", None),
        getattr(data, "num_dropped", None),
    )
    counter = _Counter(facts, tokenizer, sequence_length)
    shown = {number * len(dataset) // num_shown for number in range(num_shown)} if not is_stream else range(num_shown)
    lengths = []
    for number, sample in enumerate(_samples(dataset)):
        ids, trained = _ids_and_trained(sample)
        lengths.append(len(ids))
        counter.add(ids, trained, sample.get("label"))
        if number in shown:
            label = None if labels is None else labels[int(sample["label"])]
            facts.samples.append(SampleView(number, view_tokens(tokenizer, ids.tolist(), trained.tolist()), label))
    facts.lengths = np.asarray(lengths, np.int64)
    return facts


def view_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], trained: Sequence[bool]) -> list[TokenView]:
    """Every token with the text that it adds.

    A token may be a part of a character (bytes), and a blank in front of a word shows only after another word, so each
    is decoded together with the last ones before it that were whole.
    """
    special = set(tokenizer.all_special_ids)
    views: list[TokenView] = []
    start = shown = 0
    for position, token in enumerate(ids):
        before = str(tokenizer.decode(ids[start:shown]))
        until = str(tokenizer.decode(ids[start : position + 1]))
        text = ""
        # The replacement character stands for bytes that are no character yet.
        if not until.endswith("\N{REPLACEMENT CHARACTER}") or position == len(ids) - 1:
            text, start, shown = until[len(before) :], shown, position + 1
        views.append(TokenView(token, text, bool(trained[position]), token in special))
    return views


def bin_lengths(lengths: _Integers) -> list[tuple[int, int, int]]:
    """A histogram of at most 13 bins of equal, round width, from the first that is not empty: (first length, last
    length, samples)."""
    longest = int(lengths.max())
    rough = max(1, -(-longest // NUM_BINS))
    magnitude = 10 ** (len(str(rough)) - 1)
    width = next(step * magnitude for step in (1, 2, 5, 10) if step * magnitude >= rough)
    counts = np.bincount((lengths - 1) // width)
    bins = [(number * width + 1, min((number + 1) * width, longest), int(n)) for number, n in enumerate(counts)]
    return bins[int(np.flatnonzero(counts)[0]) :]


class _Counter:
    """Adds samples to the facts of a source."""

    def __init__(self, facts: SourceFacts, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> None:
        self._facts, self._sequence_length = facts, sequence_length
        self._bos, self._eos, self._unk = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id != self._eos else None
        self._special = set(tokenizer.all_special_ids)
        self._seen: set[bytes] = set()
        self._tokenizer, self._blank = tokenizer, dict[int, bool]()

    def add(self, ids: _Integers, trained: npt.NDArray[np.bool_], label: Any) -> None:
        facts = self._facts
        facts.num_trained_tokens += int(trained.sum())
        facts.largest_id = max(facts.largest_id, int(ids.max(initial=0)))
        of_tokens = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
        facts.digests.add(of_tokens)
        whole = hashlib.blake2b(of_tokens + trained.tobytes() + repr(label).encode(), digest_size=16).digest()
        facts.num_duplicates += whole in self._seen
        self._seen.add(whole)
        if label is not None:
            facts.label_counts[int(label)] += 1
        if self._bos is not None:
            facts.num_bos_first += bool(ids[0] == self._bos)
            facts.num_bos_twice += bool(len(ids) > 1 and ids[0] == ids[1] == self._bos)
        end = self._end_of(ids)
        ends_special = int(ids[end]) in self._special
        facts.num_end_trained += ends_special and bool(trained[end])
        facts.num_end_masked += ends_special and not trained[end]
        facts.num_cut += len(ids) >= self._sequence_length and not ends_special
        if self._eos is not None:
            facts.num_eos_inside += bool(((ids[:end] == self._eos) & trained[:end]).any())
        if self._pad is not None:
            facts.num_pad_inside += bool((ids == self._pad).any())
        if self._unk is not None and self._unk not in (self._bos, self._eos):
            facts.num_unknown_tokens += int((ids == self._unk).sum())

    def _end_of(self, ids: _Integers) -> int:
        """Place of the last token, or of the special one before it if only blanks are between: templates write a line
        end behind the end of a turn."""
        end = len(ids) - 1
        while end > 0 and self._is_blank(int(ids[end])):
            end -= 1
        return end if int(ids[end]) in self._special else len(ids) - 1

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = token not in self._special and not self._tokenizer.decode([token]).strip()
        return self._blank[token]


def _samples(dataset: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(dataset, Dataset):
        yield from islice(iter(dataset), MAX_STREAMED)
        return
    for batch in dataset.iter(_ROWS_AT_ONCE):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def _ids_and_trained(sample: dict[str, Any]) -> tuple[_Integers, npt.NDArray[np.bool_]]:
    """Token ids, and which of them the loss counts: none of a classification, and never the first of a text."""
    ids = np.asarray(sample["input_ids"], np.int64)
    if "labels" not in sample:
        return ids, np.zeros(len(ids), np.bool_)
    trained = np.asarray(sample["labels"], np.int64) != IGNORED_LABEL
    trained[:1] = False
    return ids, trained
