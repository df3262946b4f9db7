"""Several sources in one training set, each with its weight or its number of samples.

    source of n samples    weight w       round(w * n) samples an epoch
                           num_samples m  m samples an epoch
    of m from n            every sample m // n times, and m % n of them, drawn at random, once more

As in the mixtures of Tulu (Wang et al. 2023, arXiv 2306.04751; `dataset_mixer` of allenai/open-instruct), where a
weight above 1 is not used. What is drawn depends on the seed, the place in the list and n only, so it is the same on
every rank, and the same in all epochs. The order of training then mixes the samples of all sources.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy
import pyarrow.compute
import torch
from datasets import Dataset, concatenate_datasets

from sparse_ds.config.errors import UserError
from sparse_ds.data.tokenization import IGNORED_LABEL
from sparse_ds.data.tokenized import TokenizedData


class MixturePart(Protocol):
    """One entry of the list `data.train`."""

    @property
    def source(self) -> str: ...
    @property
    def weight(self) -> float | None: ...
    @property
    def num_samples(self) -> int | None: ...
    @property
    def format(self) -> str | None: ...


@dataclass(frozen=True)
class MixedData(TokenizedData):
    """A mixture. Its counts of truncated and dropped samples are those of all sources as they were read.

    Attributes:
        parts: every source, and which of its samples were taken, in the order of `dataset`.
    """

    parts: tuple[tuple[TokenizedData, Sequence[int]], ...] = ()

    def row_of(self, sample: int) -> int | str:
        for data, taken in self.parts:
            if sample < len(taken):
                return f"{data.source}, row {data.row_of(taken[sample])}"
            sample -= len(taken)
        raise IndexError(sample)

    def describe(self) -> str:
        shares = ", ".join(f"{len(taken):,} of {data.source}" for data, taken in self.parts)
        return f"mixture of {len(self.dataset):,} samples ({shares}), {self._describe_tokens()}"


def mix(parts: Sequence[TokenizedData], settings: Sequence[MixturePart], seed: int) -> MixedData:
    """Take the samples of every source and put them behind each other.

    Args:
        parts: the sources, tokenized.
        settings: as many entries of `data.train`.
        seed: of the run.

    Raises:
        UserError: a weight so small that no sample is taken.
    """
    taken = []
    for number, (data, part) in enumerate(zip(parts, settings, strict=True)):
        num_there = len(data.dataset)
        wanted = part.num_samples
        if wanted is None:
            wanted = round((1.0 if part.weight is None else part.weight) * num_there)
        if wanted < 1:
            raise UserError(
                f"data.train[{number}].weight: {part.weight} of the {num_there} samples of {data.source} is less than "
                "one sample. Raise it, or remove the source."
            )
        taken.append(draw_samples(num_there, wanted, f"{seed} {number}"))
    dataset = concatenate_datasets([data.dataset.select(indices) for data, indices in zip(parts, taken, strict=True)])
    num_tokens, num_trained_tokens = count_tokens(dataset)
    return MixedData(
        dataset=dataset,
        source=" + ".join(data.source for data in parts),
        format_name=" + ".join(dict.fromkeys(data.format_name for data in parts)),
        is_detected=all(data.is_detected for data in parts),
        num_tokens=num_tokens,
        num_trained_tokens=num_trained_tokens,
        num_truncated=sum(data.num_truncated for data in parts),
        num_dropped=sum(data.num_dropped for data in parts),
        sample_prompts=parts[0].sample_prompts,
        parts=tuple(zip(parts, taken, strict=True)),
    )


def draw_samples(num_there: int, wanted: int, key: str) -> list[int]:
    """Which of `num_there` samples make up `wanted`: all as often as it goes, the rest drawn at random, ascending."""
    whole, rest = divmod(wanted, num_there)
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    drawn = torch.randperm(num_there, generator=torch.Generator().manual_seed(seed))[:rest]
    return [*(list(range(num_there)) * whole), *sorted(drawn.tolist())]


def count_tokens(dataset: Dataset) -> tuple[int, int]:
    """(all tokens, tokens that the loss counts) of a tokenized data set. Memory: a thousand rows."""
    num_tokens = num_trained = 0
    for table in dataset.with_format("arrow").iter(1000):
        for labels in table.column("labels").chunks:
            ends = numpy.cumsum(pyarrow.compute.list_value_length(labels).to_numpy())
            counts = labels.flatten().to_numpy() != IGNORED_LABEL
            num_tokens += counts.size
            # The first token of a sample is predicted from nothing.
            num_trained += int(counts.sum()) - int(counts[ends - numpy.diff(ends, prepend=0)].sum())
    return num_tokens, num_trained
