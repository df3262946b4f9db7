"""Golden token ids and masks of every format in every template, and the oracle that makes them.

    python tests/parity/golden_samples.py      writes tests/parity/golden_samples/<format>.json anew

The oracle knows nothing of `sparse_ds.data`: transformers renders the chat templates as their authors published them
(Llama-2-chat, Mistral-7B-Instruct-v0.2, ChatML, Zephyr), the Alpaca prompt is typed here, and what is learned is found
in the rendered text by regular expressions. Token ids are those of the tokenizer inside the package.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sparse_ds.embedded import resolve_model

FOLDER = Path(__file__).parent / "golden_samples"

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if loop.first and system_message is defined %}"
    "{{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}"
    "{%- else %}{{- ' [INST] ' + message['content'] + ' [/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token}}{%- endif %}{%- endfor %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
ALPACA_INPUT = ", paired with an input that provides further context"

TALK = [
    {"role": "system", "content": "Say the opposite."},
    {"role": "user", "content": "hot"},
    {"role": "assistant", "content": "cold"},
    {"role": "user", "content": "What is big?\nSay it. "},
    {"role": "assistant", "content": "It is small.\n\nNot big. é"},
]
ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Add the numbers.", "input": "one two", "output": "three"},
    "prompt_completion": {"prompt": "The grass is", "completion": " green."},
    "messages": {"messages": TALK},
    "sharegpt": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]} for turn in TALK[1:]
        ],
        "system": TALK[0]["content"],
    },
    "text": {"text": "Tom has a red ball.\nThe ball is red."},
}
TEMPLATES = ("auto", "tokenizer", "alpaca", "chatml", "llama-2", "mistral", "file")
"""`tokenizer` is Zephyr's, which the tokenizer is given; `file` is a Jinja file with the same text."""


def golden_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer inside the package, with Zephyr's chat template as its own."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("embedded"))
    tokenizer.chat_template = ZEPHYR
    return tokenizer


def oracle(format_name: str, template: str) -> tuple[list[int], list[int]]:
    """(token ids, 1 where the model learns) of `ROWS[format_name]`."""
    tokenizer, row = golden_tokenizer(), ROWS[format_name]
    if format_name == "text":
        ids = tokenizer("<s>" + row["text"] + "</s>", add_special_tokens=False)["input_ids"]
        return ids, [1] * len(ids)
    if format_name in ("messages", "sharegpt"):
        return _marked(tokenizer, *_rendered(tokenizer, TALK, "tokenizer" if template == "auto" else template))
    if format_name == "alpaca" and template in ("auto", "alpaca"):
        prompt = ALPACA.format(ALPACA_INPUT) + "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}".format(
            **row
        )
        return _joined(tokenizer, prompt + "\n\n### Response:\n", row["output"])
    if template == "auto":
        return _joined(tokenizer, row["prompt"], row["completion"])
    asked = f"{row['instruction']}\n\n{row['input']}" if format_name == "alpaca" else row["prompt"]
    answered = row["output"] if format_name == "alpaca" else row["completion"]
    exchange = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return _marked(tokenizer, *_rendered(tokenizer, exchange, template))


def _rendered(tokenizer: PreTrainedTokenizerBase, talk: list[dict[str, str]], template: str) -> tuple[str, str]:
    """The conversation as text, and the expression that finds in it, as group 1, what is learned."""
    if template == "alpaca":
        system = [turn["content"] for turn in talk if turn["role"] == "system"]
        text = "<s>" + (system[0] if system else ALPACA.format(""))
        for turn in talk:
            if turn["role"] == "user":
                text += f"\n\n### Instruction:\n{turn['content']}"
            elif turn["role"] == "assistant":
                text += f"\n\n### Response:\n{turn['content']}</s>"
        return text, r"### Response:\n(.*?</s>)"
    published = {"llama-2": LLAMA_2, "mistral": MISTRAL, "chatml": CHATML}.get(template, ZEPHYR)
    text = str(tokenizer.apply_chat_template(talk, chat_template=published, tokenize=False))
    if template == "chatml":
        # The tokenizer does not know <|im_end|>, so the assistant ends with EOS; BOS is written as the tokenizer does.
        text = "<s>" + re.sub(r"(<\|im_start\|>assistant\n.*?)<\|im_end\|>", r"\1</s>", text, flags=re.DOTALL)
        return text, r"<\|im_start\|>assistant\n(.*?</s>)"
    return text, r"\[/INST\](.*?</s>)" if template in ("llama-2", "mistral") else r"<\|assistant\|>\n(.*?</s>)"


def _marked(tokenizer: PreTrainedTokenizerBase, text: str, learned: str) -> tuple[list[int], list[int]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [match.span(1) for match in re.finditer(learned, text, flags=re.DOTALL)]
    offsets = encoded["offset_mapping"]
    mask = [int(any(start <= first and last <= end for start, end in spans)) for first, last in offsets]
    return encoded["input_ids"], mask


def _joined(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    asked = tokenizer("<s>" + prompt, add_special_tokens=False)["input_ids"]
    answered = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return asked + answered, [0] * len(asked) + [1] * len(answered)


def cases() -> list[tuple[str, str]]:
    """(format, template) of all golden samples; a template has no effect on text."""
    return [(name, template) for name in ROWS for template in TEMPLATES if name != "text" or template == "auto"]


def write() -> None:
    """Write all golden files."""
    FOLDER.mkdir(exist_ok=True)
    tokenizer = golden_tokenizer()
    for name, row in ROWS.items():
        templates = {}
        for template in [template for case, template in cases() if case == name]:
            ids, mask = oracle(name, template)
            learned = [token for token, flag in zip(ids, mask, strict=True) if flag]
            templates[template] = {
                "text": tokenizer.decode(ids),
                "learned": tokenizer.decode(learned),
                "input_ids": ids,
                "mask": mask,
            }
        text = json.dumps({"row": row, "templates": templates}, indent=1, ensure_ascii=False)
        # One list a line.
        text = re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
