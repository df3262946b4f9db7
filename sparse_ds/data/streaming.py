"""Training data that is read and tokenized while it is used: sample i is always the same one, on every rank.

    rows of all sources, in their order (row_stream)      read and checked by every rank
    | step 0: G rows | step 1: G rows | ...               G = samples of one optimizer step over all ranks
        rank r tokenizes the rows that it is asked for

Every rank reads to the end of a step before it hands out the first row of it, so a row that cannot be read ends all
ranks at the same place. A row that the tokenizer's template refuses, or of which nothing to learn is left, is known
only to the rank that tokenizes it; if bad rows are skipped, the next usable row of the same step takes its place, and
is so used twice. A run that goes on reads the rows up to its place again, without tokenizing them.

Nothing is kept on disk. Memory: the shuffle buffers, and the rows of one step.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from sparse_ds.config.errors import UserError
from sparse_ds.data.bad_rows import BadRows
from sparse_ds.data.row_stream import StreamPart, stream_rows
from sparse_ds.data.sample_prompts import SamplePrompt, prompt_of_sample
from sparse_ds.data.sample_reader import SampleReader
from sparse_ds.data.samples import Sample
from sparse_ds.data.sources import RowSource
from sparse_ds.data.tokenization import EncodedSample, SampleEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

STEPS_OF_A_STREAM = 2**30
"""A stream has no end; more steps than any run makes."""
_FINGERPRINT_SAMPLES = 64
_FINGERPRINT_BYTES = 1 << 20
_REMEMBERED_STEPS = 8


@dataclass(frozen=True, slots=True)
class StreamSource:
    """One source of a stream.

    Attributes:
        source: its rows.
        reader: of the same source.
        weight: relative to the other sources' weights; above 0.
    """

    source: RowSource
    reader: SampleReader
    weight: float


class StreamBadRows(BadRows):
    """Says now and then how many rows were left out: the first time, the tenth, the hundredth and so on."""

    def refuse(self, number: int, error: UserError) -> None:
        super().refuse(number, error)
        count = len(self._numbers)
        if count == 10 ** (len(str(count)) - 1):
            _logger.warning("%s: rows left out so far: %d. This one: %s", self.field, count, error)


_Drawn = tuple[SampleReader, int, Sample]
"""A row that could be read, with its reader and its number in its source."""


class StreamedDataset(Dataset[dict[str, list[int]]]):
    """Samples by their number in the stream. Asked in ascending order, it reads on; else it begins anew.

    Args:
        sources: what is streamed.
        global_batch_size: G, samples of one optimizer step over all ranks.
        shuffle_buffer: rows from which each sample of a source is drawn; 1 keeps the order.
        seed: of the run.
    """

    def __init__(
        self, sources: Sequence[StreamSource], *, global_batch_size: int, shuffle_buffer: int, seed: int
    ) -> None:
        self._sources, self._seed = tuple(sources), seed
        self._global_batch_size, self._shuffle_buffer = global_batch_size, shuffle_buffer
        self._places: dict[int, list[str]] = {}
        self._begin()

    def __len__(self) -> int:
        return STEPS_OF_A_STREAM * self._global_batch_size

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """`input_ids` and `labels` of a sample.

        Raises:
            UserError: a row of the step cannot be read; on every rank that asks for a sample of the step.
            RuntimeError: this sample cannot be tokenized and bad rows are not skipped; on this rank only.
        """
        step, position = divmod(index, self._global_batch_size)
        rows = self._rows_of_step(step)
        for reader, number, sample in (*rows[position:], *rows[:position]):
            (result,) = reader.try_encode([sample])
            if not isinstance(result, UserError):
                return {"input_ids": result.input_ids, "labels": result.labels}
            try:
                reader.bad_rows.refuse(number, result)
            except UserError as error:
                raise RuntimeError(str(error)) from None
        raise UserError(
            f"data.train: none of the {len(rows)} rows of step {step + 1} can be used; one of them: {result}"
        )

    def place_of(self, index: int) -> str:
        """Where a sample comes from, as text, if it is one of the last few steps."""
        step, position = divmod(index, self._global_batch_size)
        places = self._places.get(step)
        return f"sample {index} of the stream" if places is None else places[position]

    def first_samples(self) -> Iterator[tuple[Sample, EncodedSample]]:
        """Usable samples in the order of the sources, source by source; does not move the stream."""
        for each in self._sources:
            unheard = BadRows(each.reader.bad_rows.field, "skip")
            for _, sample in unheard.convert(each.source.with_broken(), each.reader.to_sample):
                (result,) = each.reader.try_encode([sample])
                if not isinstance(result, UserError):
                    yield sample, result

    def fingerprint(self) -> str:
        """sha256 of what can be known of a stream without reading it.

        Of files their sizes and the first and last MiB of each; of other sources the name; the first samples,
        tokenized; and what else decides the order. Changes in the middle of a large file that keep its size are not
        seen, nor are those of a hub data set behind its first samples.
        """
        settings = [self._global_batch_size, self._shuffle_buffer, self._seed]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for each in self._sources:
            files = [content for content in each.source.contents if isinstance(content, Path)]
            texts = [content for content in each.source.contents if isinstance(content, str)]
            digest.update(json.dumps([each.weight, texts if files else each.source.name, len(files)]).encode())
            for path in files:
                digest.update(_ends_of(path))
        for _, encoded in islice(self.first_samples(), _FINGERPRINT_SAMPLES):
            digest.update(json.dumps([encoded.input_ids, encoded.labels]).encode())
        return digest.hexdigest()

    def _begin(self) -> None:
        parts = [StreamPart(each.source.name, each.weight, partial(_open_pass, each)) for each in self._sources]
        self._stream = stream_rows(parts, buffer_rows=self._shuffle_buffer, seed=self._seed)
        self._next_step = 0
        self._rows: list[_Drawn] = []

    def _rows_of_step(self, step: int) -> list[_Drawn]:
        if step < self._next_step - 1:
            self._begin()
        if step > self._next_step + _REMEMBERED_STEPS:
            _logger.info("data.train: reading the stream up to step %d", step + 1)
        while self._next_step <= step:
            self._rows = list(islice(self._stream, self._global_batch_size))
            self._places[self._next_step] = [sample.location for _, _, sample in self._rows]
            self._places.pop(self._next_step - _REMEMBERED_STEPS, None)
            self._next_step += 1
        return self._rows


@dataclass(frozen=True)
class StreamedData:
    """What is known of a stream; the fields are those of `TokenizedData`, and nothing is counted."""

    dataset: StreamedDataset
    source: str
    format_name: str
    sample_prompts: list[SamplePrompt]
    num_trained_tokens: int = 0
    labels: None = None

    def row_of(self, sample: int) -> str:
        """The row from which a sample was made, as text."""
        return self.dataset.place_of(sample)

    def describe(self) -> str:
        """One line for the start of a run."""
        return f"{self.source}: a stream, format {self.format_name}"


def open_stream(
    sources: Sequence[StreamSource],
    tokenizer: PreTrainedTokenizerBase,
    encoder: SampleEncoder,
    *,
    global_batch_size: int,
    shuffle_buffer: int,
    seed: int,
    num_sample_prompts: int,
) -> StreamedData:
    """Begin a stream.

    Args:
        sources: what is streamed.
        tokenizer: the model's.
        encoder: of the same tokenizer.
        global_batch_size: samples of one optimizer step over all ranks.
        shuffle_buffer: rows from which each sample is drawn.
        seed: of the run.
        num_sample_prompts: how many of the first samples to keep as prompts.

    Raises:
        UserError: no usable sample.
    """
    dataset = StreamedDataset(sources, global_batch_size=global_batch_size, shuffle_buffer=shuffle_buffer, seed=seed)
    first = list(islice(dataset.first_samples(), max(1, num_sample_prompts)))
    if not first:
        raise UserError("data.train: no usable sample in the whole stream. Look at its rows.")
    return StreamedData(
        dataset,
        source=" + ".join(each.source.name for each in sources),
        format_name=" + ".join(dict.fromkeys(each.reader.format.name for each in sources)),
        sample_prompts=[prompt_of_sample(tokenizer, encoder, sample) for sample, _ in first[:num_sample_prompts]],
    )


def _open_pass(each: StreamSource, number: int) -> Iterator[_Drawn]:
    """Pass `number` over a source; what cannot be read is counted in the first."""
    bad_rows = each.reader.bad_rows if number == 0 else BadRows(each.reader.bad_rows.field, "skip")
    for row, sample in bad_rows.convert(each.source.with_broken(), each.reader.to_sample):
        yield each.reader, row, sample


def _ends_of(path: Path) -> bytes:
    """sha256 of a file's size, first and last MiB."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_FINGERPRINT_BYTES)
        file.seek(max(0, size - _FINGERPRINT_BYTES))
        return hashlib.sha256(f"{size}".encode() + head + file.read()).digest()
