"""Conversations of OpenAI's and ShareGPT's kind, with tools or without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from sparse_ds.config.errors import UserError
from sparse_ds.data import build_dataset
from sparse_ds.data.conversations import messages_sample, sharegpt_sample
from sparse_ds.data.reading import Row
from sparse_ds.data.samples import Conversation

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}


def talk(convert: Callable[[Row], Conversation], **fields: Any) -> Conversation:
    return convert(Row(fields, "rows.jsonl, line 7"))


def turn(speaker: str, text: object) -> dict[str, object]:
    return {"from": speaker, "value": text}


def test_sharegpt_becomes_the_same_as_messages() -> None:
    system = {"role": "system", "content": "S"}
    expected = talk(messages_sample, messages=[system, USER, ASSISTANT])
    turns = [turn("human", "Hi"), turn("GPT", "Hello"), turn("human", "never answered")]
    assert talk(sharegpt_sample, conversations=[turn("system", "S"), *turns]) == expected
    assert talk(sharegpt_sample, conversations=turns, system="S", id="x") == expected
    assert talk(sharegpt_sample, conversations=[system, USER, ASSISTANT]) == expected
    assert talk(sharegpt_sample, conversations=turns, system=None).messages == (USER, ASSISTANT)


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert talk(messages_sample, messages=[{**USER, "content": parts}, ASSISTANT]).messages == (USER, ASSISTANT)


def test_tool_calls_are_passed_on() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    answer = {"role": "tool", "content": "5", "tool_call_id": "1", "name": "f"}
    sample = talk(messages_sample, messages=[USER, call, answer, ASSISTANT], tools=[TOOL])
    assert sample.messages == (USER, {**call, "content": ""}, answer, ASSISTANT)
    assert sample.tools == (TOOL,)
    assert talk(messages_sample, messages=[USER, ASSISTANT], tools=json.dumps([TOOL])).tools == (TOOL,)
    assert talk(messages_sample, messages=[USER, ASSISTANT], tools="").tools == ()


def test_columnar_files_fill_up_with_nulls(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    path = tmp_path / "rows.parquet"
    Dataset.from_list([{"messages": [{**USER, "name": None}, {**ASSISTANT, "name": None}]}]).to_parquet(path)
    tokenizer = make_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{{ 'name' in m }}{% endfor %}")
    assert tokenizer.decode(build_dataset(path, tokenizer).dataset[0]["input_ids"]) == "HiFalseHelloFalse</s>"


SHOWN = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}<|turn|>{{ m.role }}:"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}(){% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)


def test_calls_are_learned_and_results_are_not(
    write_jsonl: Callable[..., Path], make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    call = {"role": "assistant", "tool_calls": [CALL]}
    path = write_jsonl(
        {"messages": [USER, call, {"role": "tool", "content": "5"}, ASSISTANT], "tools": [TOOL]},
    )
    tokenizer = make_tokenizer(chat_template=SHOWN)
    (sample,) = build_dataset(path, tokenizer).dataset
    whole = "[f]<|turn|>user:Hi<|end|><|turn|>assistant:f()<|end|><|turn|>tool:5<|end|><|turn|>assistant:Hello<|end|>"
    assert tokenizer.decode(sample["input_ids"]) == whole
    assert tokenizer.decode([label for label in sample["labels"] if label != -100]) == "f()<|end|>Hello<|end|>"


@pytest.mark.parametrize(
    ("fields", "word"),
    [({"tools": [TOOL]}, "tools"), ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}, "tool_calls")],
)
def test_a_template_that_leaves_out_tools_is_not_used(
    write_jsonl: Callable[..., Path], make_tokenizer: Callable[..., Any], fields: dict[str, Any], word: str
) -> None:
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    path = write_jsonl({"messages": [USER, ASSISTANT], **fields})
    with pytest.raises(UserError, match=rf"line 1: the row has {word}, and the chat template does not show them"):
        build_dataset(path, make_tokenizer(chat_template=template))


@pytest.mark.parametrize(
    ("convert", "fields", "message"),
    [
        (
            sharegpt_sample,
            {"conversations": [turn("humann", "a")]},
            r'"conversations\[0\]\.from" is \'humann\', expected',
        ),
        (sharegpt_sample, {"conversations": [{"value": "a"}]}, r'"conversations\[0\]\.from" is missing'),
        (
            sharegpt_sample,
            {"conversations": [turn("human", 5)]},
            r'"conversations\[0\]\.value" is int \(5\), expected text',
        ),
        (sharegpt_sample, {"conversations": [turn("human", "a"), turn("gpt", " ")]}, r"value\" is empty, so there is"),
        (sharegpt_sample, {"conversations": [turn("gpt", "a")]}, r'"conversations" starts with a turn of the role'),
        (
            sharegpt_sample,
            {"conversations": [turn("human", "a")]},
            r'"conversations" has no turn of the role assistant',
        ),
        (sharegpt_sample, {"conversations": "a"}, r'"conversations" is str'),
        (
            messages_sample,
            {"messages": [USER, {**ASSISTANT, "weight": 0}]},
            r'"messages\[1\]\.weight" is 0, expected 1',
        ),
        (messages_sample, {"messages": [USER, {**ASSISTANT, "content": [{"type": "image"}]}]}, r"content\" is list"),
        (messages_sample, {"messages": [USER, ASSISTANT], "tools": "{"}, r'"tools" is str .*a list of objects'),
        (messages_sample, {"messages": [USER, ASSISTANT], "tools": [5]}, r'"tools" is list .*a list of objects'),
        (messages_sample, {"messages": [{"role": "system", "content": "S"}, ASSISTANT]}, r"starts with a turn of the"),
    ],
)
def test_wrong_conversations(convert: Callable[[Row], Conversation], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl, line 7: field .*" + message):
        talk(convert, **fields)
