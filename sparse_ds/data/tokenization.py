"""Samples to token ids and labels.

    PromptCompletion   ids     = BOS? + ids(prompt) + ids(completion) + EOS
                       labels  = -100 ...             ids(completion) + EOS
    Conversation       ids     = what the tokenizer's apply_chat_template gives
                       labels  = the assistant turns with their end-of-turn token, -100 elsewhere
    Text               ids     = BOS? + ids(text) + EOS                      labels = ids
    stream             ids     = blocks of BOS? + ids(text)                  labels = ids

- Prompt and completion are tokenized apart and joined, so that the boundary falls between two tokens and the prompt's
  ids are the ones that the model sees when it is asked later. (Tokenizing the joined text could merge the prompt's last
  and the completion's first character into one token.) A sentencepiece tokenizer so starts a completion with its word
  mark, as it does with a completion that it is asked to score.
- BOS? is whatever the tokenizer puts in front of a text by itself: one token for Llama and Mistral, none for others. It
  is not repeated where the text already starts with it, nor EOS where the text already ends with it.
- Longer samples are cut at the end, at `sequence_length`: the prompt's start stays, and a cut completion has no EOS, so
  that the model does not learn to stop there. Nothing may be left to learn after that; the caller drops such samples.
- A label counts only from the second token on: the model predicts token t from the tokens before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from sparse_ds.config.errors import UserError
from sparse_ds.data.samples import Conversation, PromptCompletion, Sample, Text
from sparse_ds.data.templates import (
    leading_ids,
    marks_assistant_turns,
    render_conversation,
    tokenize_marked_conversation,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# torch.nn.functional.cross_entropy leaves such positions out by default; so does every loss of transformers.
IGNORED_LABEL = -100


class EncodedSample(NamedTuple):
    """One sample of at most `sequence_length` tokens.

    Attributes:
        input_ids: token ids, without padding.
        labels: the same ids where the model learns, -100 elsewhere; same length.
        is_truncated: tokens were cut off at the end.
    """

    input_ids: list[int]
    labels: list[int]
    is_truncated: bool

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that the loss counts."""
        return sum(label != IGNORED_LABEL for label in self.labels[1:])


class SampleEncoder:
    """Tokenizes samples and whole texts; the same on every rank.

    Args:
        tokenizer: any tokenizer of transformers with an EOS token.
        sequence_length: tokens of the longest sample, BOS and EOS included; at least 2.

    Raises:
        UserError: the tokenizer has no EOS token, or the length is below 2.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> None:
        if sequence_length < 2:
            raise UserError(f"data.sequence_length is {sequence_length}, expected at least 2 tokens.")
        if tokenizer.eos_token_id is None:
            raise UserError(
                "model.name_or_path: the model's tokenizer has no EOS token, so the model could not learn to stop. Set "
                "eos_token in its tokenizer_config.json."
            )
        self._tokenizer = tokenizer
        self.sequence_length = sequence_length
        self._eos: int = tokenizer.eos_token_id
        self._leading_ids = leading_ids(tokenizer)

    def encode(self, samples: Sequence[Sample]) -> list[EncodedSample]:
        """Tokenize samples of any kind; the order is kept.

        Raises:
            UserError: the chat template refuses a conversation, or renders it so that its turns cannot be told apart.
        """
        encoded = []
        for result in self.try_encode(samples):
            if isinstance(result, UserError):
                raise result
            encoded.append(result)
        return encoded

    def try_encode(self, samples: Sequence[Sample]) -> list[EncodedSample | UserError]:
        """As `encode`, with the error in the place of a sample that has one."""
        piece_ids = iter(self._tokenize([piece for sample in samples for piece in _pieces(sample)]))
        encoded: list[EncodedSample | UserError] = []
        for sample in samples:
            if isinstance(sample, PromptCompletion):
                prompt_ids = self._with_leading(next(piece_ids))
                completion_ids = self._with_eos(next(piece_ids))
                labels = [IGNORED_LABEL] * len(prompt_ids) + completion_ids
                encoded.append(self._cut(prompt_ids + completion_ids, labels))
            elif isinstance(sample, Text):
                ids = self._with_eos(self._with_leading(next(piece_ids)))
                encoded.append(self._cut(ids, list(ids)))
            else:
                try:
                    encoded.append(self._cut(*self._conversation(sample)))
                except UserError as error:
                    encoded.append(error)
        return encoded

    def encode_stream(self, text: str) -> Iterator[EncodedSample]:
        """Tokenize one running text and cut it into blocks of exactly `sequence_length` tokens.

        BOS stands at the very start only. The last block may be shorter; a single token left over is dropped, since
        nothing could be predicted from it. Memory: the ids of the whole text.
        """
        ids = self._with_leading(self._tokenize([text])[0])
        for start in range(0, len(ids), self.sequence_length):
            block = ids[start : start + self.sequence_length]
            if len(block) > 1:
                yield EncodedSample(block, list(block), is_truncated=False)

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids of a prompt as `encode` puts them in front of its completion."""
        return self._with_leading(self._tokenize([prompt])[0])

    def plain_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of whole texts, each as `prompt_ids` gives them, not cut."""
        return [self._with_leading(ids) for ids in self._tokenize(list(texts))]

    def rendered_ids(self, text: str) -> list[int]:
        """The ids of a text that a chat template has rendered with all its special tokens."""
        return self._tokenize([text])[0]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids without any special token that the tokenizer would add; special tokens written in the text are kept."""
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _with_leading(self, ids: list[int]) -> list[int]:
        leading = self._leading_ids
        return ids if ids[: len(leading)] == leading else leading + ids

    def _with_eos(self, ids: list[int]) -> list[int]:
        return ids if ids[-1:] == [self._eos] else [*ids, self._eos]

    def _cut(self, ids: list[int], labels: list[int]) -> EncodedSample:
        length = self.sequence_length
        return EncodedSample(ids[:length], labels[:length], is_truncated=len(ids) > length)

    def _conversation(self, sample: Conversation) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation; a last turn that the template leaves open is closed with EOS."""
        if marks_assistant_turns(self._tokenizer):
            ids, trained = tokenize_marked_conversation(self._tokenizer, sample)
        else:
            ids, trained = self._conversation_by_prefixes(sample)
        if not any(trained):
            raise UserError(
                f"{sample.location}: the chat template leaves out what the assistant says "
                "or does not mark it, so there is nothing to learn. Use another template, or write the data as prompt "
                "and completion."
            )
        labels = [token if flag else IGNORED_LABEL for token, flag in zip(ids, trained, strict=True)]
        if labels and labels[-1] != IGNORED_LABEL and ids[-1] not in self._tokenizer.all_special_ids:
            ids, labels = [*ids, self._eos], [*labels, self._eos]
        return ids, labels

    def _conversation_by_prefixes(self, sample: Conversation) -> tuple[list[int], list[bool]]:
        """Find the assistant turns by rendering the conversation's beginnings.

        An assistant turn starts where the conversation before it, rendered with the generation prompt, ends: exactly
        what the model is given when it has to answer. It ends where the conversation up to it ends, less the blanks
        that the template writes after the end-of-turn token. Boundaries are compared as token ids of the whole
        rendering; should a token span one, it belongs to the turn.
        """
        turns = [number for number, message in enumerate(sample.messages) if message["role"] == "assistant"]
        whole = render_conversation(self._tokenizer, sample)
        beginnings: list[str] = []
        for number in turns:
            asked = render_conversation(self._tokenizer, sample, number, add_generation_prompt=True)
            beginnings += [asked, render_conversation(self._tokenizer, sample, number + 1)]
        if not all(whole.startswith(beginning) for beginning in beginnings):
            raise UserError(
                f"{sample.location}: the chat template renders a turn differently once later ones "
                "follow, so the assistant's words cannot be told apart. Use a template that marks them with "
                "{% generation %}, or write the data as prompt and completion."
            )
        ids, *beginning_ids = self._tokenize([whole, *beginnings])
        trained = [False] * len(ids)
        for asked_ids, answered_ids in zip(beginning_ids[::2], beginning_ids[1::2], strict=True):
            start, end = _num_common(ids, asked_ids), _num_common(ids, answered_ids)
            end = self._without_trailing_blanks(ids, start, end)
            trained[start:end] = [True] * (end - start)
        return ids, trained

    def _without_trailing_blanks(self, ids: list[int], start: int, end: int) -> int:
        """The end of `ids[start:end]` without blanks behind its last special token, if it has one."""
        special = set(self._tokenizer.all_special_ids)
        last = next((position for position in range(end - 1, start - 1, -1) if ids[position] in special), None)
        if last is None or self._tokenizer.decode(ids[last + 1 : end]).strip():
            return end
        return last + 1


def _pieces(sample: Sample) -> tuple[str, ...]:
    """The texts of a sample that are tokenized as they are; a conversation is rendered first."""
    if isinstance(sample, PromptCompletion):
        return (sample.prompt, sample.completion)
    return (sample.text,) if isinstance(sample, Text) else ()


def _num_common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
