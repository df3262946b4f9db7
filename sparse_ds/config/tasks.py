"""One entry of `data.tasks`: a file of questions that the model answers, and how they are asked and graded."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

PositiveInt = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]


class TaskConfig(BaseModel):
    """A task. A plain text in its place is its `source`, with the defaults below."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    source: Text
    """A file with one question a row (JSONL, JSON, CSV, Parquet), or what else `data.train` may name."""
    name: Text | None = None
    """What the task is called in reports, or null: the name of its file without the suffix."""
    kind: Literal["auto", "multiple_choice", "exact_match", "continuation"] = "auto"
    """`multiple_choice`: the likeliest of the given choices; `exact_match`: the generated answer equals the reference;
    `continuation`: the given text is what the model would write. `auto` tells it by the names of the fields."""
    prompt: Text | None = None
    """The question, with fields of the row in braces: `"Question: {question}\\nAnswer:"`, `{choices[0]}`; null: the
    field of the question as it is."""
    chat: bool = False
    """Ask through the tokenizer's chat template: the prompt is what the user says."""
    choices: Annotated[list[Text], Field(min_length=2)] | None = None
    """`multiple_choice` only: the same choices for all rows (`["A", "B", "C", "D"]`); null: those of each row."""
    reference: Text | None = None
    """`exact_match` only: the right answer, with fields in braces like `prompt`; null: the field of the answer."""
    answer_pattern: Text | None = None
    """`exact_match` only: a regular expression; its first match in the generated text is the answer (its first group,
    if it has one), and likewise in the reference. Null: the first line that is not blank."""
    max_new_tokens: PositiveInt = 64
    """`exact_match` only: the longest answer in tokens, 1 or more."""
    stop: list[Text] = []
    """`exact_match` only: texts at which an answer ends, besides the EOS token."""
    num_samples: PositiveInt | None = None
    """At most so many rows are asked, from the first, 1 or more; null: all."""

    @field_validator("answer_pattern")
    @classmethod
    def _is_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"no regular expression: {error}") from None
        return pattern


def _from_text(task: Any) -> Any:
    return {"source": task} if isinstance(task, str) else task


Task = Annotated[TaskConfig, BeforeValidator(_from_text)]

KEYS_OF_KIND = {
    "exact_match": ("reference", "answer_pattern", "max_new_tokens", "stop"),
    "multiple_choice": ("choices",),
}
"""Kind -> the settings that no other kind uses."""


def find_idle_keys(task: TaskConfig, kind: str) -> list[str]:
    """The settings that differ from their defaults and that a task of this kind does not use."""
    idle = [key for user, keys in KEYS_OF_KIND.items() for key in keys if user != kind]
    return [key for key in idle if getattr(task, key) != TaskConfig.model_fields[key].default]
