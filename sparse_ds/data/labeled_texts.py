"""The texts of a classification to token ids: as the model's architecture, and perhaps an instruction, wants them.

    decoder    ids = BOS? + ids(text), cut at the end, without pad tokens at its end        no EOS
               a pair is one text of two lines
    encoder    what the tokenizer itself makes of a text or a pair, cut by it at its longest part:
               [CLS] text [SEP] pair [SEP] with token types 0 and 1, or <s> text </s></s> pair </s>

With an instruction (`data.instruction`) its {text} and {text_pair} are replaced, and the result is one text; without
{text_pair} in it, {text} is the pair of two lines. What is too long then loses the end of the texts in it (of the
longer one first), never a part of the instruction.

transformers' decoder classifiers read the last token that is not `pad_token_id`, and know nothing of the attention
mask. A text may end with that token itself where the EOS token (or the unknown token) pads. Such tokens at the end are
taken away here, so that the last token of every sample is the one that is read, in training as in plain transformers
later, which cannot tell them from padding: attention is causal, so what follows the token that is read changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_ds.config.errors import UserError
from sparse_ds.data.samples import LabeledText
from sparse_ds.data.tokenization import SampleEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT, PAIR = "{text}", "{text_pair}"
"""What an instruction holds in place of a sample's texts."""


@dataclass(frozen=True)
class ClassifierInputs:
    """What the architecture wants.

    Attributes:
        is_encoder: the tokenizer itself arranges texts and special tokens.
        has_token_types: the model tells the first text of a pair from the second by `token_type_ids`.
        max_tokens: the model has no more positions than these; None: no limit.
    """

    is_encoder: bool = False
    has_token_types: bool = False
    max_tokens: int | None = None


class EncodedText(NamedTuple):
    """One sample; empty `token_type_ids` where the model has none."""

    input_ids: list[int]
    token_type_ids: list[int]
    is_truncated: bool


_Texts = tuple[str, str | None]


class LabeledTextEncoder:
    """See the module docstring.

    Args:
        tokenizer: the model's.
        sequence_length: tokens of the longest sample; the model's own limit counts as well.
        inputs: what the architecture wants.
        pad_token_id: what the collator pads with.
        instruction: a text with {text} in it, or None.

    Raises:
        UserError: a decoder's tokenizer has no EOS token, or the length is below 2.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        inputs: ClassifierInputs,
        pad_token_id: int,
        instruction: str | None = None,
    ) -> None:
        self._tokenizer, self._inputs, self._pad_token_id = tokenizer, inputs, pad_token_id
        self._instruction = instruction
        self._wants_pair = instruction is not None and PAIR in instruction
        self.sequence_length = min(sequence_length, inputs.max_tokens or sequence_length)
        self._decoder = None if inputs.is_encoder else SampleEncoder(tokenizer, self.sequence_length)

    @property
    def has_token_types(self) -> bool:
        """Whether samples have `token_type_ids`."""
        return self._inputs.has_token_types

    def encode(self, samples: Sequence[LabeledText]) -> list[EncodedText | UserError]:
        """Tokenize samples; the order is kept.

        Returns:
            Of each its ids, or what is wrong with it: it has no token, or no second text where the instruction wants
            one.

        Raises:
            UserError: the instruction leaves no room for a text.
        """
        made: list[EncodedText | UserError] = [
            UserError(
                f"{sample.location}: has no second text, which data.instruction wants as {PAIR}. Add it to the row, or "
                "take it out of the instruction."
            )
            for sample in samples
        ]
        usable = [
            position for position, sample in enumerate(samples) if sample.pair is not None or not self._wants_pair
        ]
        encoded = self._encode([self._texts(samples[position]) for position in usable])
        for position, one in zip(usable, encoded, strict=True):
            sample = samples[position]
            if len(one.input_ids) > self.sequence_length:
                one = self._cut(sample, one)
            if self._decoder is not None:
                one = one._replace(input_ids=_without_end_padding(one.input_ids, self._pad_token_id))
            made[position] = one
            if not one.input_ids:
                reason = "the tokenizer makes no token of the text. Remove the sample."
                made[position] = UserError(f"{sample.location}: {reason}")
        return made

    def _texts(self, sample: LabeledText, num_characters: int | None = None) -> _Texts:
        """What is tokenized; of either text at most its first `num_characters`."""
        text, pair = sample.text[:num_characters], sample.pair
        pair = None if pair is None else pair[:num_characters]
        joined = text if pair is None else f"{text}\n{pair}"
        if self._instruction is None:
            return (text, pair) if self._inputs.is_encoder else (joined, None)
        if pair is None or not self._wants_pair:
            return self._instruction.replace(TEXT, joined), None
        # In one go: a text that holds "{text_pair}" stays as it is.
        parts = [part.replace(TEXT, text) for part in self._instruction.split(PAIR)]
        return pair.join(parts), None

    def _encode(self, texts: Sequence[_Texts], **options: Any) -> list[EncodedText]:
        """Whole, unless `options` of the tokenizer say otherwise."""
        if self._decoder is not None:
            return [EncodedText(ids, [], False) for ids in self._decoder.plain_ids([text for text, _ in texts])]
        encoded: list[EncodedText | None] = [None] * len(texts)
        for is_pair in (False, True):
            chosen = [position for position, (_, pair) in enumerate(texts) if (pair is not None) == is_pair]
            if not chosen:
                continue
            pairs = [texts[position][1] for position in chosen] if is_pair else None
            made = self._tokenizer([texts[position][0] for position in chosen], pairs, verbose=False, **options)
            types = made.get("token_type_ids") if self._inputs.has_token_types else None
            for row, position in enumerate(chosen):
                encoded[position] = EncodedText(made["input_ids"][row], [] if types is None else types[row], False)
        return [one for one in encoded if one is not None]

    def _cut(self, sample: LabeledText, whole: EncodedText) -> EncodedText:
        """The sample within `sequence_length` tokens."""
        length = self.sequence_length
        if self._instruction is not None:
            return self._cut_texts(sample)
        if self._decoder is not None:
            return EncodedText(whole.input_ids[:length], [], True)
        (cut,) = self._encode([self._texts(sample)], truncation=True, max_length=length)
        return cut._replace(is_truncated=True)

    def _cut_texts(self, sample: LabeledText) -> EncodedText:
        """As many characters of either text as fit, found by halving."""
        fitting: EncodedText | None = None
        low, high = 0, max(len(sample.text), len(sample.pair or "")) - 1
        while low <= high:
            middle = (low + high) // 2
            (tried,) = self._encode([self._texts(sample, middle)])
            if len(tried.input_ids) <= self.sequence_length:
                fitting, low = tried, middle + 1
            else:
                high = middle - 1
        if fitting is None:
            raise UserError(
                f"data.instruction: takes more than data.sequence_length = {self.sequence_length} tokens by itself. "
                "Raise the length, or shorten the instruction."
            )
        return fitting._replace(is_truncated=True)


def _without_end_padding(ids: list[int], pad_token_id: int) -> list[int]:
    """`ids` up to the last one that is no pad token, one id at least."""
    length = len(ids)
    while length > 1 and ids[length - 1] == pad_token_id:
        length -= 1
    return ids[:length]
