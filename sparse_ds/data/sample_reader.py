"""One source's rows to tokenized samples, with what the run says about formats, templates and rows that are bad."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from sparse_ds.config.errors import UserError
from sparse_ds.data.bad_rows import BadRows, NothingLeftError, OnBadRow
from sparse_ds.data.formats import choose_format
from sparse_ds.data.reading import Row
from sparse_ds.data.samples import Sample
from sparse_ds.data.sources import RowSource, TextSource
from sparse_ds.data.templates import check_chat_template
from sparse_ds.data.tokenization import EncodedSample, SampleEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONVERSATIONS = ("messages", "sharegpt")


@dataclass(frozen=True, slots=True)
class SampleRules:
    """What the config's `data` section says about every sample; each field is documented there."""

    data_format: str = "auto"
    template: str = "auto"
    truncate: bool = True
    on_bad_row: OnBadRow = "error"


class SampleReader:
    """Reads one source.

    Args:
        source: rows or running text.
        tokenizer: the model's, with the chat template of the run.
        encoder: of the same tokenizer.
        rules: of the run.
        field: the config field that the source comes from, for messages.
        bad_rows: takes the bad rows, as `rules` say; None: one of its own.

    Attributes:
        format: the format of the source.
        bad_rows: the rows that were left out so far.

    Raises:
        UserError: no format fits, or the format needs a chat template and there is none.
    """

    def __init__(
        self,
        source: RowSource | TextSource,
        tokenizer: PreTrainedTokenizerBase,
        encoder: SampleEncoder,
        rules: SampleRules,
        field: str,
        bad_rows: BadRows | None = None,
    ) -> None:
        self._source, self._encoder, self._rules = source, encoder, rules
        self.format = choose_format(source, rules.data_format, field)
        self.bad_rows = bad_rows or BadRows(field, rules.on_bad_row)
        self._convert = self.format.to_sample
        # A row of Alpaca's format in Alpaca's template keeps the prompt that shows its input.
        is_wrapped = rules.template not in ("auto", self.format.name)
        if is_wrapped and self.format.to_conversation is not None:
            self._convert = self.format.to_conversation
        if self.format.name in _CONVERSATIONS or self._convert is self.format.to_conversation:
            check_chat_template(tokenizer, field)

    @property
    def ignores_template(self) -> bool:
        """Whether the run names a template and this source has no use for it."""
        return self._rules.template != "auto" and self.format.name == "text"

    def to_sample(self, row: Row) -> Sample:
        """Check a row and convert it.

        Raises:
            UserError: the row is bad.
        """
        if row.broken is not None:
            raise row.broken
        return self._convert(row)

    def try_encode(self, samples: Sequence[Sample]) -> list[EncodedSample | UserError]:
        """The samples tokenized, each with something to learn, or why that cannot be."""
        results = zip(samples, self._encoder.try_encode(samples), strict=True)
        return [self._checked(sample.location, result) for sample, result in results]

    def read(self, batch_size: int) -> Iterator[tuple[Sample | None, EncodedSample]]:
        """All usable samples in the order of the source; the blocks of a running text belong to no sample.

        Args:
            batch_size: samples that are tokenized at once.

        Raises:
            UserError: a row is bad, and bad rows are not skipped.
        """
        if isinstance(self._source, TextSource):
            for text in self._source.texts:
                for block in self._encoder.encode_stream(text):
                    yield None, block
            return
        rows = self.bad_rows.convert(self._source.with_broken(), self.to_sample)
        while batch := list(islice(rows, batch_size)):
            numbers, samples = zip(*batch, strict=True)
            for number, sample, result in zip(numbers, samples, self.try_encode(samples), strict=True):
                if isinstance(result, UserError):
                    self.bad_rows.refuse(number, result)
                else:
                    yield sample, result

    def _checked(self, location: str, result: EncodedSample | UserError) -> EncodedSample | UserError:
        if isinstance(result, UserError):
            return result
        length = self._encoder.sequence_length
        if result.is_truncated and not self._rules.truncate:
            return UserError(
                f"{location}: the sample is longer than data.sequence_length = {length} tokens. Raise it, shorten the "
                "sample, or set data.truncate to true."
            )
        if result.num_trained_tokens == 0:
            if result.is_truncated:
                return NothingLeftError(
                    f"{location}: nothing to learn is left within data.sequence_length = {length} tokens. Raise it, or "
                    "shorten the prompt."
                )
            return UserError(f"{location}: there is nothing to learn in the sample. Remove it.")
        return result
