"""From what the config names to what the trainer takes: the package's entry points.

    open_source -> choose_format -> Format.to_sample -> SampleEncoder -> in-memory Dataset
                                                                         [input_ids, labels] int32

Rows are read, checked and tokenized 1000 at a time and kept as Arrow arrays: 8 bytes a token. Every rank does the same
work on the same files and gets the same bytes; nothing is cached on disk. A mistake in any row ends it before training.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.utils import tqdm

from sparse_ds.config.errors import UserError
from sparse_ds.data.classification import tokenize_labeled
from sparse_ds.data.collation import CausalCollator, ClassificationCollator
from sparse_ds.data.formats import Format, Sample, choose_format
from sparse_ds.data.labeled_texts import ClassifierInputs, LabeledTextEncoder
from sparse_ds.data.sample_prompts import SamplePrompt, prompt_of_sample, prompt_of_text
from sparse_ds.data.sources import RowSource, TextSource, open_source
from sparse_ds.data.templates import check_chat_template
from sparse_ds.data.tokenization import EncodedSample, SampleEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

_CHUNK_SAMPLES = 1000
_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})


class DataSettings(Protocol):
    """What `build_datasets` reads of the config's `data` section."""

    @property
    def train(self) -> str: ...
    @property
    def eval(self) -> str | None: ...
    @property
    def format(self) -> str: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def num_eval_samples(self) -> int | None: ...
    @property
    def labels(self) -> list[str] | None: ...
    @property
    def instruction(self) -> str | None: ...


@dataclass(frozen=True)
class TokenizedData:
    """One source, tokenized.

    Attributes:
        dataset: columns `input_ids` and `labels` (lists of int32 of the same length), or `input_ids` and `label` (int)
            for a classification, in the order of the source.
        source: what was read, as messages show it.
        format_name: `alpaca`, `prompt_completion`, `messages`, `text` or `classification`.
        is_detected: the format was detected, not asked for.
        num_tokens: all tokens.
        num_trained_tokens: tokens that the loss counts; for a classification: samples.
        num_truncated: samples kept that lost their end to `sequence_length`.
        num_dropped: samples left out because nothing to learn was left of them.
        sample_prompts: the prompts of the first samples; none for a classification.
        labels: of a classification, in the order of their numbers; else None.
        dropped_rows: rows of the source that were left out, ascending, counted from 0.
    """

    dataset: Dataset
    source: str
    format_name: str
    is_detected: bool
    num_tokens: int
    num_trained_tokens: int
    num_truncated: int
    num_dropped: int
    sample_prompts: list[SamplePrompt]
    labels: tuple[str, ...] | None = None
    dropped_rows: tuple[int, ...] = ()

    def row_of(self, sample: int) -> int:
        """The row of the source from which a sample of `dataset` was made; both count from 0."""
        row = sample
        for dropped in self.dropped_rows:
            if dropped > row:
                break
            row += 1
        return row

    def describe(self) -> str:
        """One line for the start of a run."""
        how = "detected" if self.is_detected else "as configured"
        if self.labels is not None:
            return (
                f"{self.source}: {len(self.dataset):,} samples of {len(self.labels)} labels, format {self.format_name} "
                f"({how}), {self.num_tokens:,} tokens"
            )
        share = self.num_trained_tokens / self.num_tokens
        return (
            f"{self.source}: {len(self.dataset):,} samples, format {self.format_name} ({how}), "
            f"{self.num_tokens:,} tokens, {self.num_trained_tokens:,} of them trained ({share:.0%})"
        )


@dataclass(frozen=True)
class DataBundle:
    """All that the trainer needs of the data.

    Attributes:
        train: columns `input_ids`, `labels` (for a classification `label`).
        eval: the same, or None without held-out data.
        collator: makes micro batches of both.
        format_name: the format of the training data.
        num_trained_tokens: tokens of `train` that the loss counts, in one epoch.
        sample_prompts: of the first held-out samples, or of the first training samples where nothing is held out.
        train_data, eval_data: how each source was read.
    """

    train: Dataset
    eval: Dataset | None
    collator: CausalCollator | ClassificationCollator
    format_name: str
    num_trained_tokens: int
    sample_prompts: list[SamplePrompt]
    train_data: TokenizedData
    eval_data: TokenizedData | None


def build_datasets(
    data_config: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str = "causal_lm",
    classifier_inputs: ClassifierInputs | None = None,
    num_sample_prompts: int = 1,
    show_progress: bool = False,
) -> DataBundle:
    """Read and tokenize the training and the held-out data.

    Args:
        data_config: the config's `data` section.
        tokenizer: the model's. Its EOS token pads where it has no pad token.
        task: `causal_lm` or `sequence_classification`.
        classifier_inputs: how the model of a classification wants its texts; None: as a decoder does.
        num_sample_prompts: how many prompts to keep for showing answers.
        show_progress: true on the one rank that shows a progress bar and logs what was read.

    Raises:
        UserError: anything wrong with the data; names the file, the line and the field.
    """
    train_source = open_source(data_config.train, field="data.train", split="train")
    eval_source = open_source(data_config.eval, field="data.eval", split="validation") if data_config.eval else None
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if task == "sequence_classification":
        inputs = classifier_inputs or ClassifierInputs()
        labeled = LabeledTextEncoder(
            tokenizer, data_config.sequence_length, inputs, pad_token_id, data_config.instruction
        )
        collator = ClassificationCollator(pad_token_id, max_tokens=inputs.max_tokens)
        return _build_labeled(data_config, labeled, train_source, eval_source, collator, show_progress)
    encoder = SampleEncoder(tokenizer, data_config.sequence_length)
    train_data = _tokenize_source(
        train_source,
        tokenizer,
        encoder,
        data_format=data_config.format,
        max_samples=None,
        num_sample_prompts=0 if eval_source else num_sample_prompts,
        field="data.train",
        show_progress=show_progress,
    )
    eval_data = None
    if eval_source:
        eval_data = _tokenize_source(
            eval_source,
            tokenizer,
            encoder,
            data_format=data_config.format,
            max_samples=data_config.num_eval_samples,
            num_sample_prompts=num_sample_prompts,
            field="data.eval",
            show_progress=show_progress,
        )
    return DataBundle(
        train=train_data.dataset,
        eval=eval_data.dataset if eval_data else None,
        collator=CausalCollator(pad_token_id),
        format_name=train_data.format_name,
        num_trained_tokens=train_data.num_trained_tokens,
        sample_prompts=(eval_data or train_data).sample_prompts,
        train_data=train_data,
        eval_data=eval_data,
    )


def _build_labeled(
    data_config: DataSettings,
    encoder: LabeledTextEncoder,
    train_source: RowSource | TextSource,
    eval_source: RowSource | TextSource | None,
    collator: ClassificationCollator,
    show_progress: bool,
) -> DataBundle:
    def tokenize(
        source: RowSource | TextSource, labels: Sequence[str] | None, max_samples: int | None, field: str
    ) -> TokenizedData:
        read = tokenize_labeled(
            source,
            encoder,
            labels=labels,
            max_samples=max_samples,
            field=field,
            show_progress=show_progress,
        )
        data = TokenizedData(
            dataset=read.dataset,
            source=source.name,
            format_name="classification",
            is_detected=data_config.format == "auto",
            num_tokens=read.num_tokens,
            num_trained_tokens=len(read.dataset),
            num_truncated=read.num_truncated,
            num_dropped=0,
            sample_prompts=[],
            labels=read.labels,
        )
        if show_progress:
            _log(data, field, encoder.sequence_length)
        return data

    train_data = tokenize(train_source, data_config.labels, None, "data.train")
    eval_data = None
    if eval_source is not None:
        eval_data = tokenize(eval_source, train_data.labels, data_config.num_eval_samples, "data.eval")
    return DataBundle(
        train=train_data.dataset,
        eval=eval_data.dataset if eval_data else None,
        collator=collator,
        format_name=train_data.format_name,
        num_trained_tokens=train_data.num_trained_tokens,
        sample_prompts=[],
        train_data=train_data,
        eval_data=eval_data,
    )


def build_dataset(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data_format: str = "auto",
    sequence_length: int = 2048,
    max_samples: int | None = None,
    split: str = "train",
    num_sample_prompts: int = 0,
    field: str = "data.train",
    show_progress: bool = False,
) -> TokenizedData:
    """Read and tokenize one source.

    Args:
        source: a file, a folder, a hub name or an embedded name; see `sparse_ds.data.sources`.
        tokenizer: the model's.
        data_format: `auto` or a format's name.
        sequence_length: tokens of the longest sample; longer ones lose their end.
        max_samples: stop after so many samples (blocks, for a `.txt` file); None reads all.
        split: for sources with several, where `source` names none.
        num_sample_prompts: how many of the first samples to keep as prompts.
        field: the config field that the source comes from, for messages.
        show_progress: true on the one rank that shows a progress bar and logs what was read.

    Raises:
        UserError: anything wrong with the data; names the file, the line and the field.
    """
    return _tokenize_source(
        open_source(source, field=field, split=split),
        tokenizer,
        SampleEncoder(tokenizer, sequence_length),
        data_format=data_format,
        max_samples=max_samples,
        num_sample_prompts=num_sample_prompts,
        field=field,
        show_progress=show_progress,
    )


def _tokenize_source(
    source: RowSource | TextSource,
    tokenizer: PreTrainedTokenizerBase,
    encoder: SampleEncoder,
    *,
    data_format: str,
    max_samples: int | None,
    num_sample_prompts: int,
    field: str,
    show_progress: bool,
) -> TokenizedData:
    if max_samples is not None and max_samples < 1:
        raise UserError(f"the number of samples to read for {field} is {max_samples}, expected at least 1 or none.")
    chosen = choose_format(source, data_format, field)
    if chosen.name == "messages":
        check_chat_template(tokenizer, field)
    chunks: list[Dataset] = []
    waiting: list[EncodedSample] = []
    sample_prompts: list[SamplePrompt] = []
    dropped_rows: list[int] = []
    num_samples = num_tokens = num_trained_tokens = num_truncated = 0
    batch_size = min(_CHUNK_SAMPLES, max_samples or _CHUNK_SAMPLES)
    pairs = _encoded_samples(source, chosen, encoder, batch_size)
    for sample, encoded in tqdm(pairs, desc=f"tokenizing {field}", unit=" samples", disable=not show_progress, delay=1):
        num_trained = encoded.num_trained_tokens
        if num_trained == 0:
            dropped_rows.append(num_samples + len(dropped_rows))
            continue
        if len(sample_prompts) < num_sample_prompts:
            sample_prompts.append(
                prompt_of_text(tokenizer, encoded.input_ids)
                if sample is None
                else prompt_of_sample(tokenizer, encoder, sample)
            )
        num_samples += 1
        num_tokens += len(encoded.input_ids)
        num_trained_tokens += num_trained
        num_truncated += encoded.is_truncated
        waiting.append(encoded)
        if len(waiting) == _CHUNK_SAMPLES:
            chunks.append(_arrow_chunk(waiting))
            waiting = []
        if num_samples == max_samples:
            break
    if waiting:
        chunks.append(_arrow_chunk(waiting))
    if not chunks:
        raise UserError(
            f"{field}: no usable sample in {source.name}: of all {len(dropped_rows):,} nothing to learn is left within "
            f"data.sequence_length = {encoder.sequence_length} tokens. Raise it or shorten the prompts."
        )
    data = TokenizedData(
        dataset=concatenate_datasets(chunks),
        source=source.name,
        format_name=chosen.name,
        is_detected=data_format == "auto",
        num_tokens=num_tokens,
        num_trained_tokens=num_trained_tokens,
        num_truncated=num_truncated,
        num_dropped=len(dropped_rows),
        sample_prompts=sample_prompts,
        dropped_rows=tuple(dropped_rows),
    )
    if show_progress:
        _log(data, field, encoder.sequence_length)
    return data


def _encoded_samples(
    source: RowSource | TextSource, chosen: Format, encoder: SampleEncoder, batch_size: int
) -> Iterator[tuple[Sample | None, EncodedSample]]:
    """Samples with their tokens, in the order of the source; the blocks of a running text belong to no sample."""
    if isinstance(source, TextSource):
        for block in encoder.encode_stream(source.text):
            yield None, block
        return
    samples = (chosen.to_sample(row) for row in source)
    while batch := list(islice(samples, batch_size)):
        yield from zip(batch, encoder.encode(batch), strict=True)


def _arrow_chunk(encoded: list[EncodedSample]) -> Dataset:
    columns = {"input_ids": [one.input_ids for one in encoded], "labels": [one.labels for one in encoded]}
    return Dataset.from_dict(columns, features=_FEATURES)


def _log(data: TokenizedData, field: str, sequence_length: int) -> None:
    _logger.info("%s: %s", field, data.describe())
    if data.num_truncated:
        _logger.warning(
            "%s: %d of %d samples are longer than data.sequence_length = %d tokens and lose their end",
            field,
            data.num_truncated,
            len(data.dataset),
            sequence_length,
        )
    if data.num_dropped:
        _logger.warning(
            "%s: %d samples are left out: data.sequence_length = %d tokens leave nothing to learn of them",
            field,
            data.num_dropped,
            sequence_length,
        )
