"""Chat templates by name, for base models whose tokenizer has none, and the one that a run uses.

Each for a system message S, a question Q and an answer A; `<s>` and `</s>` are the tokenizer's own BOS and EOS.

    alpaca   <s>S\\n\\n### Instruction:\\nQ\\n\\n### Response:\\nA</s>         without S Alpaca's own preamble
    chatml   <s><|im_start|>system\\nS<|im_end|>\\n<|im_start|>user\\nQ<|im_end|>\\n<|im_start|>assistant\\nA<|im_end|>
    llama-2  <s>[INST] <<SYS>>\\nS\\n<</SYS>>\\n\\nQ [/INST] A </s>         the next exchange with its own <s>
    mistral  <s> [INST] S\\n\\nQ [/INST] A</s>                            one <s> for all exchanges

`llama-2` renders what Llama-2-chat's published template does, `mistral` what Mistral-7B-Instruct-v0.2's does, `chatml`
what OpenAI's ChatML does but for the two points below.

- `<s>` is written only if the tokenizer puts it in front of a text by itself.
- A model must learn to stop, and generation stops at EOS. ChatML's turn of the assistant therefore ends with
  `<|im_end|>` where that is the EOS token, with `<|im_end|>` and EOS where it is another token of the vocabulary, and
  with EOS alone where the tokenizer does not know it: spelled out, it would become part of the answer.

The templates mark what the assistant says by `{% generation %}`, by which transformers finds the tokens to learn.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from sparse_ds.config.errors import UserError
from sparse_ds.data.templates import ALPACA_PREAMBLE, leading_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED_TEMPLATES = ("alpaca", "chatml", "llama-2", "mistral")

_SYSTEM = "{% set system = messages[0]['content'] if messages[0]['role'] in ('system', 'developer') else none %}"
_TURNS = "{% set turns = messages if system is none else messages[1:] %}"
_NO_TOOLS = (
    "{% for m in messages %}{% if m['role'] == 'tool' or m['tool_calls'] or tools %}"
    "{{ raise_exception('this template knows no tools') }}{% endif %}{% endfor %}"
)
_ALTERNATING = (
    "{% for m in turns %}{% if m['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('after a system message or none, user and assistant must alternate') }}{% endif %}{% endfor %}"
)
# BOS and END are filled in for the tokenizer.
_ALPACA = (
    _NO_TOOLS + _SYSTEM + _TURNS + _ALTERNATING + f"{{{{ BOS + (system or {ALPACA_PREAMBLE!r}) }}}}"
    "{% for m in turns %}{% if m['role'] == 'user' %}{{ '\\n\\n### Instruction:\\n' + m['content'] }}{% else %}"
    "{{ '\\n\\n### Response:\\n' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)
_CHATML = (
    _NO_TOOLS + "{{ BOS }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + END }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA_2 = (
    _NO_TOOLS + _SYSTEM + _TURNS + _ALTERNATING + "{% for m in turns %}{% if m['role'] == 'user' %}"
    "{{ BOS + '[INST] ' + ((('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n') if loop.first and system is not none else '')"
    " + m['content']).strip() + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
_MISTRAL = (
    _NO_TOOLS + _SYSTEM + _TURNS + _ALTERNATING + "{{ BOS }}{% for m in turns %}{% if m['role'] == 'user' %}"
    "{{ ' [INST] ' + ((system + '\\n\\n') if loop.first and system is not none else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
_TEXTS = dict(zip(NAMED_TEMPLATES, (_ALPACA, _CHATML, _LLAMA_2, _MISTRAL), strict=True))
_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def named_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text of a template of this file, for this tokenizer."""
    bos = (
        "bos_token" if tokenizer.bos_token_id is not None and tokenizer.bos_token_id in leading_ids(tokenizer) else "''"
    )
    end = "eos_token"
    if tokenizer.eos_token == "<|im_end|>":
        end = "'<|im_end|>'"
    elif "<|im_end|>" in tokenizer.get_vocab():
        end = "'<|im_end|>' + eos_token"
    return _TEXTS[name].replace("BOS", bos).replace("END", end)


def without_marks(template: str) -> str:
    """The template without its `{% generation %}` tags, which not every program that reads templates knows.

    What it renders stays the same as long as no tag is written with a minus sign, which takes blanks away.
    """
    return _MARKS.sub("", template)


def use_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make `data.template` the chat template of the tokenizer.

    Args:
        tokenizer: of the run; its `chat_template` is set, unless `name` is `auto` or `tokenizer`.
        name: `auto`, `tokenizer`, one of `NAMED_TEMPLATES`, or the path of a Jinja file.

    Raises:
        UserError: no such template or file, a file that is not UTF-8 or no Jinja, a tokenizer without a template.
    """
    if name == "auto":
        return
    if name == "tokenizer":
        if not tokenizer.chat_template:
            raise UserError(
                "data.template: got tokenizer, and the model's tokenizer has no chat template. Name one: "
                f"{', '.join(NAMED_TEMPLATES)}, or a Jinja file."
            )
        return
    tokenizer.chat_template = named_template(name, tokenizer) if name in NAMED_TEMPLATES else _read_file(name)
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"data.template: {name}, line {error.lineno}: no valid Jinja: {error.message}") from None
    except Exception:
        pass


def exported_template(tokenizer: PreTrainedTokenizerBase, name: str) -> str | None:
    """What a trained model's tokenizer should have as its chat template; None: what the base's has.

    Args:
        tokenizer: of the run, after `use_template`.
        name: `data.template`.
    """
    if name in ("auto", "tokenizer"):
        return None
    template: str = tokenizer.get_chat_template()
    return without_marks(template) if name in NAMED_TEMPLATES else template


def _read_file(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"data.template: got {name}, expected auto, tokenizer, one of {', '.join(NAMED_TEMPLATES)}, or the path of "
            f"a Jinja file; there is no such file in {Path.cwd()}."
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"data.template: {name}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from None
    except OSError as error:
        raise UserError(f"data.template: {name} cannot be read: {error.strerror or error}.") from None
