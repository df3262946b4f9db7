"""The text that the model reads around a sample.

Alpaca rows get the prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, `train.py`, `PROMPT_DICT`), with a
line end after `### Response:` so that the answer starts on its own line. Conversations get the tokenizer's chat
template, which may be one that the run names (`named_templates`), and nothing else.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import jinja2

from sparse_ds.config.errors import UserError
from sparse_ds.data.samples import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = ALPACA_PREAMBLE + "\n\n### Instruction:\n{instruction}\n\n### Response:\n"

# The tag by which a chat template marks what the assistant says; the same pattern as in transformers.
_GENERATION_TAG = re.compile(r"\{\%-?\s*generation\s*-?%\}")

# A template is a program of its own: these are the ways in which it ends over a conversation that it does not expect.
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def alpaca_prompt(instruction: str, input_text: str) -> str:
    """Everything before the answer; a blank `input_text` selects the shorter prompt."""
    if input_text.strip():
        return ALPACA_WITH_INPUT.format(instruction=instruction, input=input_text)
    return ALPACA_WITHOUT_INPUT.format(instruction=instruction)


def check_chat_template(tokenizer: PreTrainedTokenizerBase, field: str) -> None:
    """Raise a UserError if the tokenizer cannot render conversations at all."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{field}: conversations need a chat template, and the model's tokenizer has none. Name one in "
            "data.template (alpaca, chatml, llama-2, mistral or a Jinja file), use a chat model, or write the data as "
            "prompt and completion."
        )


def marks_assistant_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the chat template marks the assistant's words itself, by `{% generation %}`."""
    template: str = tokenizer.get_chat_template()
    return tokenizer.is_fast and _GENERATION_TAG.search(template) is not None


def render_conversation(
    tokenizer: PreTrainedTokenizerBase,
    sample: Conversation,
    num_turns: int | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as text, special tokens included.

    Args:
        tokenizer: with a chat template.
        sample: the conversation.
        num_turns: only so many of its first turns; None: all.
        add_generation_prompt: end with what the model is given when it has to answer.

    Raises:
        UserError: the template refuses the conversation (many require that user and assistant alternate).
    """
    return str(_apply(tokenizer, sample, num_turns, tokenize=False, add_generation_prompt=add_generation_prompt))


def tokenize_marked_conversation(
    tokenizer: PreTrainedTokenizerBase, sample: Conversation
) -> tuple[list[int], list[bool]]:
    """Token ids and, for each, whether it lies within a `{% generation %}` block.

    Raises:
        UserError: the template refuses the conversation.
    """
    rendered = _apply(
        tokenizer,
        sample,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    return list(rendered["input_ids"]), [bool(flag) for flag in rendered["assistant_masks"]]


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text (it may put others behind it)."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def _apply(
    tokenizer: PreTrainedTokenizerBase, sample: Conversation, num_turns: int | None = None, **settings: Any
) -> Any:
    _check_tools(tokenizer, sample)
    tools = [dict(tool) for tool in sample.tools] or None
    try:
        return tokenizer.apply_chat_template(list(sample.messages[:num_turns]), tools=tools, **settings)
    except _TEMPLATE_ERRORS as error:
        raise UserError(
            f"{sample.location}: the chat template refuses the conversation: {error or type(error).__name__}"
        ) from None


def _check_tools(tokenizer: PreTrainedTokenizerBase, sample: Conversation) -> None:
    """Many templates leave out tool calls without a word: the model would learn to say nothing there."""
    has_calls = any("tool_calls" in message for message in sample.messages)
    if not sample.tools and not has_calls:
        return
    template: str = tokenizer.get_chat_template()
    for is_used, word in ((bool(sample.tools), "tools"), (has_calls, "tool_calls")):
        if is_used and word not in template:
            raise UserError(
                f"{sample.location}: the row has {word}, and the chat template does not show them. Use a template that "
                "does (data.template), or remove them."
            )
