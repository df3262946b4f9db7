"""What rows become: three kinds of samples to learn from, and a labeled text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""A turn: `role` and `content`, and `tool_calls`, `tool_call_id` and `name` where the data has them."""


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A prompt that is read and a completion that is learned."""

    prompt: str
    completion: str
    location: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, of which the assistant's are learned; it ends with one of them.

    Attributes:
        messages: the turns.
        location: where it came from.
        tools: descriptions of functions that the chat template may show; none for most data.
    """

    messages: tuple[Message, ...]
    location: str
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """A document of which every token is learned."""

    text: str
    location: str


@dataclass(frozen=True, slots=True)
class LabeledText:
    """A text, or a pair of texts, of which the label is learned."""

    text: str
    label: str
    location: str
    pair: str | None = None


Sample = PromptCompletion | Conversation | Text
