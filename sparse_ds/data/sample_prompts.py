"""Prompts to show what the model answers before and after training, next to the answer that the data gives."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparse_ds.config.errors import UserError
from sparse_ds.data.formats import FORMATS
from sparse_ds.data.reading import Row
from sparse_ds.data.samples import PromptCompletion, Sample, Text
from sparse_ds.data.templates import render_conversation
from sparse_ds.data.tokenization import SampleEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of running text, the beginning is the prompt and the next tokens are the reference.
_TEXT_PROMPT_TOKENS = 32
_TEXT_REFERENCE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """A question to the model.

    Attributes:
        input_ids: exactly what stands in front of the answer in training, BOS included if there is one.
        text: the prompt as a person reads it.
        reference: the answer that the data gives, as text.
    """

    input_ids: list[int]
    text: str
    reference: str


def build_prompt(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], format_name: str) -> SamplePrompt:
    """The prompt of one row as the user wrote it.

    Args:
        tokenizer: the model's.
        row: field name -> value.
        format_name: a format, not `auto`.

    Raises:
        UserError: unknown format, a missing field or one of the wrong type.
    """
    if format_name not in FORMATS:
        raise UserError(f"the format is {format_name!r}, expected one of {', '.join(FORMATS)}.")
    sample = FORMATS[format_name].to_sample(Row(row, "sample prompt"))
    return prompt_of_sample(tokenizer, SampleEncoder(tokenizer, sys.maxsize), sample)


def prompt_of_sample(tokenizer: PreTrainedTokenizerBase, encoder: SampleEncoder, sample: Sample) -> SamplePrompt:
    """The prompt before the completion, before the conversation's first assistant turn, or the text's beginning."""
    if isinstance(sample, PromptCompletion):
        return SamplePrompt(encoder.prompt_ids(sample.prompt), sample.prompt, sample.completion)
    if isinstance(sample, Text):
        return prompt_of_text(tokenizer, encoder.prompt_ids(sample.text))
    first = next(number for number, message in enumerate(sample.messages) if message["role"] == "assistant")
    asked = render_conversation(tokenizer, sample, first, add_generation_prompt=True)
    return SamplePrompt(encoder.rendered_ids(asked), asked, sample.messages[first]["content"])


def prompt_of_text(tokenizer: PreTrainedTokenizerBase, input_ids: list[int]) -> SamplePrompt:
    """The first tokens of a text, at most half of it, and those that follow."""
    length = min(_TEXT_PROMPT_TOKENS, max(1, len(input_ids) // 2))
    prompt_ids, next_ids = input_ids[:length], input_ids[length : length + _TEXT_REFERENCE_TOKENS]
    text = str(tokenizer.decode(prompt_ids, skip_special_tokens=True))
    return SamplePrompt(prompt_ids, text, str(tokenizer.decode(next_ids, skip_special_tokens=True)))
