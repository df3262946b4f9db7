"""One task, one model: asked and graded, on any number of ranks in step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sparse_ds.evaluation.generation import generate_answers
from sparse_ds.evaluation.grading import TaskScore, grade_answers, grade_choices, grade_continuations
from sparse_ds.evaluation.likelihood import score_texts
from sparse_ds.evaluation.prompts import EncodedPrompts, EncodedTexts, PromptEncoder
from sparse_ds.evaluation.questions import QuestionSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 2048
"""Tokens, for a model whose config.json says nothing of its length."""


class TaskScorer:
    """A task made ready for a model: encoded once, asked as often as wanted.

    Args:
        task: read and checked.
        tokenizer: the model's.
        max_length: tokens that the model takes at most.

    Raises:
        UserError: as `PromptEncoder`.
    """

    def __init__(self, task: QuestionSet, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.task, self._tokenizer = task, tokenizer
        encoder = PromptEncoder(tokenizer, max_length)
        self._encoded: EncodedPrompts | EncodedTexts
        self._encoded = encoder.prompts(task) if task.kind == "exact_match" else encoder.scored_texts(task)
        self.num_truncated = self._encoded.num_truncated

    def score(self, model: Any, batch_size: int, device: torch.device) -> TaskScore:
        """Ask the model as it is now.

        Args:
            model: a causal language model of transformers, plain or partitioned.
            batch_size: texts or prompts of one forward pass on one rank.
            device: of the model.

        Collectives: those of `score_texts` or `generate_answers`; every rank must call it.
        """
        task, tokenizer = self.task, self._tokenizer
        chance = None
        if isinstance(self._encoded, EncodedPrompts):
            texts = generate_answers(
                model,
                tokenizer,
                self._encoded.prompts,
                max_new_tokens=task.settings.max_new_tokens,
                stop=task.settings.stop,
                batch_size=batch_size,
                device=device,
            )
            metrics = grade_answers(task.questions, texts, task.settings.answer_pattern)
        else:
            scored = self._encoded.texts
            pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
            likelihoods = score_texts(model, scored, batch_size, pad_token_id, device)
            if task.kind == "continuation":
                metrics = grade_continuations(likelihoods, sum(len(text.ids) - text.start for text in scored))
            else:
                metrics, chance = grade_choices(task.questions, likelihoods)
        return TaskScore(task.name, task.kind, len(task.questions), self.num_truncated, metrics, chance)


def longest_input(config: Any) -> int:
    """Tokens that a model takes at most, by its configuration."""
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) else DEFAULT_MAX_LENGTH
