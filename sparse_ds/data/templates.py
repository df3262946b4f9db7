"""The text that the model reads around a sample.

Alpaca rows get the prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, `train.py`, `PROMPT_DICT`), with a
line end after `### Response:` so that the answer starts on its own line. Conversations get the tokenizer's own chat
template and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from sparse_ds.config.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

# The tag by which a chat template marks what the assistant says; the same pattern as in transformers.
_GENERATION_TAG = re.compile(r"\{\%-?\s*generation\s*-?%\}")

Message = dict[str, str]


def alpaca_prompt(instruction: str, input_text: str) -> str:
    """Everything before the answer; a blank `input_text` selects the shorter prompt."""
    if input_text.strip():
        return ALPACA_WITH_INPUT.format(instruction=instruction, input=input_text)
    return ALPACA_WITHOUT_INPUT.format(instruction=instruction)


def check_chat_template(tokenizer: PreTrainedTokenizerBase, field: str) -> None:
    """Raise a UserError if the tokenizer cannot render conversations at all."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{field}: the format messages needs a chat template, and the model's tokenizer has none. "
            "Use a chat model, add chat_template to its tokenizer_config.json, or write the data as prompt and "
            "completion."
        )


def marks_assistant_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the chat template marks the assistant's words itself, by `{% generation %}`."""
    template: str = tokenizer.get_chat_template()
    return tokenizer.is_fast and _GENERATION_TAG.search(template) is not None


def render_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    location: str,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as text, special tokens included.

    Raises:
        UserError: the template refuses the conversation (many require that user and assistant alternate).
    """
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:
        raise refused_by_template(error, location) from None
    return text


def refused_by_template(error: jinja2.TemplateError, location: str) -> UserError:
    """The error for a conversation that the chat template does not take."""
    return UserError(f'{location}: field "messages": the model\'s chat template refuses the conversation: {error}')


def tokenize_marked_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], location: str
) -> tuple[list[int], list[bool]]:
    """Token ids and, for each, whether it lies within a `{% generation %}` block.

    Raises:
        UserError: the template refuses the conversation.
    """
    try:
        rendered: Any = tokenizer.apply_chat_template(
            list(messages),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
    except jinja2.TemplateError as error:
        raise refused_by_template(error, location) from None
    return list(rendered["input_ids"]), [bool(flag) for flag in rendered["assistant_masks"]]
