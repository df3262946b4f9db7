"""From what the config names to what the trainer takes: the package's entry points.

    open_source -> SampleReader: Format.to_sample -> SampleEncoder -> Dataset -> mix, of several sources
                                                                      [input_ids, labels] int32

Rows are read, checked and tokenized 1000 at a time and kept as Arrow arrays: 8 bytes a token. Every rank gets the same
bytes: of each machine one does the work, and the others read it (`token_cache`), or without a folder for that all do
it. A mistake in any row ends it before training, unless bad rows are skipped. With `data.streaming` only the held-out
data goes this way; see `streaming`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.utils import tqdm
from pydantic import BaseModel

from sparse_ds.config.errors import UserError
from sparse_ds.data.bad_rows import BadRows, OnBadRow
from sparse_ds.data.classification import tokenize_labeled
from sparse_ds.data.collation import CausalCollator, ClassificationCollator
from sparse_ds.data.labeled_texts import ClassifierInputs, LabeledTextEncoder
from sparse_ds.data.mixture import MixturePart, mix
from sparse_ds.data.named_templates import use_template
from sparse_ds.data.sample_prompts import SamplePrompt, prompt_of_sample, prompt_of_text
from sparse_ds.data.sample_reader import SampleReader, SampleRules
from sparse_ds.data.sources import RowSource, TextSource, open_source
from sparse_ds.data.streaming import StreamBadRows, StreamedData, StreamedDataset, StreamSource, open_stream
from sparse_ds.data.token_cache import TokenCache, describe_tokenizer
from sparse_ds.data.tokenization import EncodedSample, SampleEncoder
from sparse_ds.data.tokenized import TokenizedData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

_CHUNK_SAMPLES = 1000
_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})


class DataSettings(Protocol):
    """What `build_datasets` reads of the config's `data` section."""

    @property
    def train(self) -> str | Sequence[MixturePart]: ...
    @property
    def eval(self) -> str | None: ...
    @property
    def format(self) -> str: ...
    @property
    def template(self) -> str: ...
    @property
    def truncate(self) -> bool: ...
    @property
    def on_bad_row(self) -> OnBadRow: ...
    @property
    def streaming(self) -> bool: ...
    @property
    def shuffle_buffer(self) -> int: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def num_eval_samples(self) -> int | None: ...
    @property
    def labels(self) -> list[str] | None: ...
    @property
    def instruction(self) -> str | None: ...


@dataclass(frozen=True)
class DataBundle:
    """All that the trainer needs of the data.

    Attributes:
        train: columns `input_ids`, `labels` (for a classification `label`); or a stream of such samples.
        eval: the same, or None without held-out data.
        collator: makes micro batches of both.
        format_name: the format of the training data.
        num_trained_tokens: tokens of `train` that the loss counts, in one epoch; 0 for a stream: not known.
        sample_prompts: of the first held-out samples, or of the first training samples where nothing is held out.
        train_data, eval_data: how each source was read.
    """

    train: Dataset | StreamedDataset
    eval: Dataset | None
    collator: CausalCollator | ClassificationCollator
    format_name: str
    num_trained_tokens: int
    sample_prompts: list[SamplePrompt]
    train_data: TokenizedData | StreamedData
    eval_data: TokenizedData | None


@dataclass(frozen=True)
class _Keeping:
    """Tokenized data from the cache or made here, said once."""

    cache: TokenCache | None
    show_progress: bool
    show_bar: bool
    sequence_length: int

    def get(
        self,
        source: RowSource | TextSource,
        settings: Mapping[str, Any],
        make: Callable[[bool], TokenizedData],
        field: str,
    ) -> TokenizedData:
        """`make` takes whether to show a bar and to log what was read; `settings` are parts of the key."""
        if self.cache is None:
            return make(self.show_progress)
        data, is_made_here = self.cache.get(source, settings, TokenizedData, lambda: make(self.show_bar), field=field)
        data = replace(data, source=source.name)
        if self.show_progress and not is_made_here:
            _logger.info("%s: tokens read from %s", field, self.cache.folder)
            _log(data, field, self.sequence_length)
        return data


def _key_parts(data_config: DataSettings, tokenizer: PreTrainedTokenizerBase, task: str) -> dict[str, Any]:
    """Of every key of a run; all settings but those that no token depends on, so that a new one is not forgotten."""
    settings = data_config.model_dump(mode="json") if isinstance(data_config, BaseModel) else vars(data_config)
    free = ("train", "eval", "num_eval_samples", "packing", "cache", "cache_dir", "streaming", "shuffle_buffer")
    settings = {name: value for name, value in settings.items() if name not in free}
    return {"task": task, "settings": settings, **describe_tokenizer(tokenizer)}


def build_datasets(
    data_config: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str = "causal_lm",
    seed: int = 0,
    global_batch_size: int = 1,
    classifier_inputs: ClassifierInputs | None = None,
    num_sample_prompts: int = 1,
    show_progress: bool = False,
    cache_folder: Path | None = None,
    show_bar: bool | None = None,
) -> DataBundle:
    """Read and tokenize the training and the held-out data.

    Args:
        data_config: the config's `data` section.
        tokenizer: the model's. Its EOS token pads where it has no pad token. Its chat template becomes the one that
            `data.template` names.
        task: `causal_lm` or `sequence_classification`.
        seed: of the run; what a mixture draws and how a stream is shuffled depend on it.
        global_batch_size: samples of one optimizer step over all ranks; a stream hands them out step by step.
        classifier_inputs: how the model of a classification wants its texts; None: as a decoder does.
        num_sample_prompts: how many prompts to keep for showing answers.
        show_progress: true on the one rank that shows a progress bar and logs what was read.
        cache_folder: where tokenized data is kept and looked for (`token_cache`); None: nowhere.
        show_bar: true on the ranks that show a progress bar if it is their turn to tokenize; None: as `show_progress`.

    Raises:
        UserError: anything wrong with the data; names the file, the line and the field.
    """
    if task != "sequence_classification":
        use_template(tokenizer, data_config.template)
    keeping = _Keeping(
        None if cache_folder is None else TokenCache(cache_folder, _key_parts(data_config, tokenizer, task)),
        show_progress=show_progress,
        show_bar=show_progress if show_bar is None else show_bar,
        sequence_length=data_config.sequence_length,
    )
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    streaming = data_config.streaming
    eval_source = None
    if task == "sequence_classification":
        assert isinstance(data_config.train, str)
        train_source = open_source(data_config.train, field="data.train", split="train")
        if data_config.eval:
            eval_source = open_source(data_config.eval, field="data.eval", split="validation")
        inputs = classifier_inputs or ClassifierInputs()
        labeled = LabeledTextEncoder(
            tokenizer, data_config.sequence_length, inputs, pad_token_id, data_config.instruction
        )
        collator = ClassificationCollator(pad_token_id, max_tokens=inputs.max_tokens)
        return _build_labeled(data_config, labeled, train_source, eval_source, collator, inputs, keeping)
    encoder = SampleEncoder(tokenizer, data_config.sequence_length)
    rules = SampleRules(data_config.format, data_config.template, data_config.truncate, data_config.on_bad_row)
    opened = _open_training_sources(data_config, rules)
    if data_config.eval:
        eval_source = open_source(data_config.eval, field="data.eval", split="validation", streaming=streaming)

    def tokenize(
        source: RowSource | TextSource, rules: SampleRules, max_samples: int | None, num_prompts: int, field: str
    ) -> TokenizedData:
        return keeping.get(
            source,
            {"rules": asdict(rules), "max_samples": max_samples, "num_sample_prompts": num_prompts},
            lambda shows: _tokenize_source(
                source,
                tokenizer,
                encoder,
                rules=rules,
                max_samples=max_samples,
                num_sample_prompts=num_prompts,
                field=field,
                show_progress=shows,
            ),
            field,
        )

    num_prompts = 0 if eval_source else num_sample_prompts
    train_data: TokenizedData | StreamedData
    if streaming:
        train_data = open_stream(
            [_stream_source(each, tokenizer, encoder) for each in opened],
            tokenizer,
            encoder,
            global_batch_size=global_batch_size,
            shuffle_buffer=data_config.shuffle_buffer,
            seed=seed,
            num_sample_prompts=num_prompts,
        )
        if show_progress:
            _logger.info("data.train: %s", train_data.describe())
    else:
        parts = [tokenize(each.source, each.rules, None, num_prompts, each.field) for each in opened]
        train_data = parts[0]
        if not isinstance(data_config.train, str):
            train_data = mix(parts, data_config.train, seed)
            if show_progress:
                _logger.info("data.train: %s", train_data.describe())
    eval_data = None
    if eval_source:
        eval_data = tokenize(eval_source, rules, data_config.num_eval_samples, num_sample_prompts, "data.eval")
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


class _TrainingSource(NamedTuple):
    source: RowSource | TextSource
    field: str
    rules: SampleRules
    weight: float


def _open_training_sources(data_config: DataSettings, rules: SampleRules) -> list[_TrainingSource]:
    def opened(name: str, field: str, rules: SampleRules, weight: float | None) -> _TrainingSource:
        source = open_source(name, field=field, split="train", streaming=data_config.streaming)
        return _TrainingSource(source, field, rules, 1.0 if weight is None else weight)

    if isinstance(data_config.train, str):
        return [opened(data_config.train, "data.train", rules, None)]
    return [
        opened(
            part.source,
            f"data.train[{number}].source",
            rules if part.format is None else replace(rules, data_format=part.format),
            part.weight,
        )
        for number, part in enumerate(data_config.train)
    ]


def _stream_source(each: _TrainingSource, tokenizer: PreTrainedTokenizerBase, encoder: SampleEncoder) -> StreamSource:
    if isinstance(each.source, TextSource):
        raise UserError(
            f"{each.field}: {each.source.name} is running text, which is read as a whole. Set data.streaming to false, "
            "or give a file with rows."
        )
    bad_rows = StreamBadRows(each.field, each.rules.on_bad_row)
    reader = SampleReader(each.source, tokenizer, encoder, each.rules, each.field, bad_rows)
    return StreamSource(each.source, reader, each.weight)


def _build_labeled(
    data_config: DataSettings,
    encoder: LabeledTextEncoder,
    train_source: RowSource | TextSource,
    eval_source: RowSource | TextSource | None,
    collator: ClassificationCollator,
    inputs: ClassifierInputs,
    keeping: _Keeping,
) -> DataBundle:
    def tokenize(
        source: RowSource | TextSource, labels: Sequence[str] | None, max_samples: int | None, field: str
    ) -> TokenizedData:
        settings = {
            "labels": labels,
            "max_samples": max_samples,
            "pad_token_id": collator.pad_token_id,
            "inputs": asdict(inputs),
        }
        return keeping.get(
            source, settings, lambda shows: tokenize_anew(source, labels, max_samples, field, shows), field
        )

    def tokenize_anew(
        source: RowSource | TextSource,
        labels: Sequence[str] | None,
        max_samples: int | None,
        field: str,
        show_progress: bool,
    ) -> TokenizedData:
        read = tokenize_labeled(
            source,
            encoder,
            labels=labels,
            max_samples=max_samples,
            bad_rows=(bad_rows := BadRows(field, data_config.on_bad_row)),
            truncate=data_config.truncate,
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
            num_dropped=len(bad_rows.numbers),
            sample_prompts=[],
            labels=read.labels,
            dropped_rows=tuple(bad_rows.numbers),
            left_out=bad_rows.describe(len(read.dataset)),
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
    template: str = "auto",
    sequence_length: int = 2048,
    truncate: bool = True,
    on_bad_row: OnBadRow = "error",
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
        template: as `data.template`; the tokenizer's chat template becomes the one that it names.
        sequence_length: tokens of the longest sample; longer ones lose their end.
        truncate: false makes longer ones bad rows.
        on_bad_row: `error`, or `skip`: leave bad rows out and count them.
        max_samples: stop after so many samples (blocks, for a `.txt` file); None reads all.
        split: for sources with several, where `source` names none.
        num_sample_prompts: how many of the first samples to keep as prompts.
        field: the config field that the source comes from, for messages.
        show_progress: true on the one rank that shows a progress bar and logs what was read.

    Raises:
        UserError: anything wrong with the data; names the file, the line and the field.
    """
    use_template(tokenizer, template)
    return _tokenize_source(
        open_source(source, field=field, split=split),
        tokenizer,
        SampleEncoder(tokenizer, sequence_length),
        rules=SampleRules(data_format, template, truncate, on_bad_row),
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
    rules: SampleRules,
    max_samples: int | None,
    num_sample_prompts: int,
    field: str,
    show_progress: bool,
) -> TokenizedData:
    if max_samples is not None and max_samples < 1:
        raise UserError(f"the number of samples to read for {field} is {max_samples}, expected at least 1 or none.")
    reader = SampleReader(source, tokenizer, encoder, rules, field)
    chunks: list[Dataset] = []
    waiting: list[EncodedSample] = []
    sample_prompts: list[SamplePrompt] = []
    num_tokens = num_trained_tokens = num_truncated = 0
    batch_size = min(_CHUNK_SAMPLES, max_samples or _CHUNK_SAMPLES)
    pairs = islice(reader.read(batch_size), max_samples)
    for sample, encoded in tqdm(pairs, desc=f"tokenizing {field}", unit=" samples", disable=not show_progress, delay=1):
        if len(sample_prompts) < num_sample_prompts:
            sample_prompts.append(
                prompt_of_text(tokenizer, encoded.input_ids)
                if sample is None
                else prompt_of_sample(tokenizer, encoder, sample)
            )
        num_tokens += len(encoded.input_ids)
        num_trained_tokens += encoded.num_trained_tokens
        num_truncated += encoded.is_truncated
        waiting.append(encoded)
        if len(waiting) == _CHUNK_SAMPLES:
            chunks.append(_arrow_chunk(waiting))
            waiting = []
    if waiting:
        chunks.append(_arrow_chunk(waiting))
    bad_rows = reader.bad_rows
    if not chunks:
        raise UserError(
            f"{field}: no usable sample in {source.name}: "
            + (bad_rows.describe(0) or f"its text is shorter than two tokens, and {field} needs some.")
        )
    data = TokenizedData(
        dataset=concatenate_datasets(chunks),
        source=source.name,
        format_name=reader.format.name,
        is_detected=rules.data_format == "auto",
        num_tokens=num_tokens,
        num_trained_tokens=num_trained_tokens,
        num_truncated=num_truncated,
        num_dropped=len(bad_rows.numbers),
        sample_prompts=sample_prompts,
        dropped_rows=tuple(bad_rows.numbers),
        left_out=bad_rows.describe(sum(map(len, chunks))),
    )
    if show_progress:
        _log(data, field, encoder.sequence_length)
        if reader.ignores_template:
            _logger.warning("%s: data.template has no effect on %s: its format is text", field, source.name)
    return data


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
    if data.left_out:
        _logger.warning("%s: %s", field, data.left_out)
