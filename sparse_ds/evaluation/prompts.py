"""Questions to token ids.

A choice is scored as lm-evaluation-harness does it (`lm_eval/api/model.py`, `_encode_pair`), so that both give the same
numbers: question and choice are one text, blanks at the question's end belong to the choice, and the choice's tokens
are those that follow the question's.

    text    = question + " " + choice          no blank where the question ends with one
    ids     = BOS? + ids(text)                 BOS? as in training: what the tokenizer puts in front by itself
    context = as many of them as BOS? + ids(question without blanks at its end)

(Departure: the harness puts its blank also behind a question that ends with one, or with a line end; give its task
`target_delimiter: ""` for the same.)

With `chat` the question is what the user says in the tokenizer's chat template, rendered up to where the assistant
begins; then nothing is put between it and the choice, and no BOS that the template does not write.

What does not fit into the model loses its beginning, never the choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jinja2

from sparse_ds.config.errors import UserError
from sparse_ds.data.templates import check_chat_template
from sparse_ds.data.tokenization import SampleEncoder
from sparse_ds.evaluation.questions import Question, QuestionSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ScoredText(NamedTuple):
    """Ids of at most `max_length` tokens, of which those from `start` on are scored."""

    ids: list[int]
    start: int


class EncodedPrompts(NamedTuple):
    """What is asked, and how many of the prompts lost their beginning."""

    prompts: list[list[int]]
    num_truncated: int


class EncodedTexts(NamedTuple):
    """What is scored: the choices of the first question, of the second, ...; and how many lost their beginning."""

    texts: list[ScoredText]
    num_truncated: int


class PromptEncoder:
    """Encodes the questions of one task; the same on every rank.

    Args:
        tokenizer: the model's.
        max_length: tokens that the model takes at most.

    Raises:
        UserError: the tokenizer has no EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._encoder = SampleEncoder(tokenizer, max_length)

    def scored_texts(self, task: QuestionSet) -> EncodedTexts:
        """All choices of all questions.

        Raises:
            UserError: a choice of no token, or one longer than the model takes; no chat template.
        """
        texts, num_truncated = [], 0
        for question in task.questions:
            prompt, separator = self._asked(question, task)
            bare = prompt.rstrip()
            if not bare:
                raise UserError(f"{question.location}: the question is blank. Fill it in or remove the row.")
            wholes = [f"{prompt}{separator}{choice}" for choice in question.choices]
            context, *encoded = self._ids([bare, *wholes], task.settings.chat)
            for choice, ids in zip(question.choices, encoded, strict=True):
                num_scored = len(ids) - len(context)
                if num_scored < 1 or num_scored >= self._max_length:
                    raise UserError(
                        f"{question.location}: the choice {choice[:40]!r} has {max(num_scored, 0)} tokens of its own, "
                        f"expected 1 to {self._max_length - 1}. Change or remove the row."
                    )
                num_truncated += len(ids) > self._max_length
                ids = ids[-self._max_length :]
                texts.append(ScoredText(ids, len(ids) - num_scored))
        return EncodedTexts(texts, num_truncated)

    def prompts(self, task: QuestionSet) -> EncodedPrompts:
        """The prompts of exact match, with room for the answer.

        Raises:
            UserError: the answer alone may be longer than the model takes; no chat template.
        """
        room = self._max_length - task.settings.max_new_tokens
        if room < 1:
            raise UserError(
                f"task {task.name}: max_new_tokens is {task.settings.max_new_tokens}, and the model takes "
                f"{self._max_length} tokens in all, the question included. Lower it."
            )
        asked = [self._asked(question, task)[0] for question in task.questions]
        encoded = self._ids(asked, task.settings.chat)
        return EncodedPrompts([ids[-room:] for ids in encoded], sum(len(ids) > room for ids in encoded))

    def _asked(self, question: Question, task: QuestionSet) -> tuple[str, str]:
        """(the text in front of the answer, what stands between them)."""
        if not task.settings.chat:
            return question.prompt, "" if question.prompt[-1].isspace() else " "
        check_chat_template(self._tokenizer, f"task {task.name}")
        messages = [{"role": "user", "content": question.prompt}]
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)), ""
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise UserError(f"{question.location}: the chat template refuses the question: {error}") from None

    def _ids(self, texts: list[str], is_rendered: bool) -> list[list[int]]:
        if is_rendered:
            return [self._encoder.rendered_ids(text) for text in texts]
        return self._encoder.plain_ids(texts)
