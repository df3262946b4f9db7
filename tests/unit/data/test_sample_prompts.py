"""A sample prompt is exactly what stands in front of the answer in training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from sparse_ds.config.errors import UserError
from sparse_ds.data import build_prompt
from sparse_ds.data.formats import FORMATS
from sparse_ds.data.reading import Row
from sparse_ds.data.tokenization import SampleEncoder

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
ROWS = {
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "answer"},
    "prompt_completion": {"prompt": "Q", "completion": "answer"},
    "messages": {
        "messages": [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "answer"},
            {"role": "user", "content": "R"},
            {"role": "assistant", "content": "later"},
        ]
    },
}


@pytest.mark.parametrize("format_name", ROWS)
def test_prompt_is_the_masked_beginning(make_tokenizer: MakeTokenizer, format_name: str) -> None:
    tokenizer = make_tokenizer(chat_template=CHAT)
    prompt = build_prompt(tokenizer, ROWS[format_name], format_name)
    encoded = SampleEncoder(tokenizer, 1000).encode([FORMATS[format_name].to_sample(Row(ROWS[format_name], "here"))])[0]
    length = next(position for position, label in enumerate(encoded.labels) if label != -100)
    assert prompt.input_ids == encoded.input_ids[:length]
    assert prompt.input_ids.count(tokenizer.bos_token_id) == 1
    assert prompt.reference == "answer"
    assert tokenizer.decode(prompt.input_ids, skip_special_tokens=False).endswith(prompt.text[-5:])


@pytest.mark.parametrize(("text", "num_prompt_tokens"), [("x" * 200, 32), ("abcd", 2), ("x", 1)])
def test_prompt_of_text_is_its_beginning(tokenizer: PreTrainedTokenizerFast, text: str, num_prompt_tokens: int) -> None:
    prompt = build_prompt(tokenizer, {"text": text}, "text")
    assert len(prompt.input_ids) == num_prompt_tokens
    assert text.startswith(prompt.text + prompt.reference)
    assert len(prompt.reference) <= 64


def test_unknown_format(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"the format is 'auto', expected one of alpaca"):
        build_prompt(tokenizer, {"text": "x"}, "auto")
